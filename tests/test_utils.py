"""Pinned kernels, and what is recorded of the environment."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import raycv
from raycv import __version__
from raycv.utils import describe_environment, package_version, pin_kernels, seldom_collecting, set_seed


def test_the_commit_is_that_of_raycvs_own_checkout_and_of_no_other(tmp_path):
    """Installed in somebody's repository, raycv must not pass that repository's commit off as its own."""
    own = tmp_path / "own"
    shutil.copytree(Path(raycv.__file__).parent, own / "raycv", ignore=shutil.ignore_patterns("__pycache__"))
    foreign = shutil.copytree(own / "raycv", tmp_path / "foreign" / "site" / "raycv").parent
    for repository in (own, tmp_path / "foreign"):
        git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    code = "from raycv.utils import describe_environment; print(describe_environment()['git'] is not None)"
    for folder, expected in ((own, "True"), (foreign, "False")):
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected, folder


def test_versions_and_hardware_are_there():
    found = describe_environment()
    assert found["packages"]["torch"]
    assert found["cpus"] >= 1
    assert found["memory_bytes"] > 1e9


@pytest.fixture
def unpinned():
    """torch as another library may have left it."""
    pin_kernels()
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    pin_kernels()


@pytest.mark.parametrize("pin", [pin_kernels, lambda: set_seed(1)])
@pytest.mark.parametrize("gpu", [False, True])
def test_kernels_are_pinned(unpinned, monkeypatch, pin, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    pin()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() != gpu
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has another kernel")
def test_a_cpu_computes_attention_by_one_kernel_with_a_mask_and_without(unpinned):
    """By Flash, not by the plain products, which take four times as long."""
    pin_kernels()
    q = torch.randn(1, 2, 8, 16)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    choices = {torch._fused_sdp_choice(q, q, q, is_causal=True), torch._fused_sdp_choice(q, q, q, attn_mask=mask)}
    assert choices == {int(torch.nn.attention.SDPBackend.FLASH_ATTENTION)}


def test_garbage_is_looked_for_as_before_whatever_happens_within():
    before = gc.get_threshold()
    with contextlib.suppress(KeyError), seldom_collecting():
        assert gc.get_threshold()[0] > before[0]
        raise KeyError
    assert gc.get_threshold() == before


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    """Beside dependencies that are: a fold would fail when it writes its first checkpoint."""

    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert package_version("raycv") == __version__
    assert package_version("torch") is None
