"""Pinned kernels, GPUs that torch cannot use, files, and what is recorded of the environment."""

import contextlib
import errno
import gc
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.builders import files_of_a_gpu
from support.refusals import refuses

import raycv
from raycv import __version__
from raycv.common import devices
from raycv.common.devices import Gpu, check_gpu_before_ray, check_own_gpu, inference_device, visible_gpu
from raycv.common.environment import describe_environment, hidden, package_version, seldom_collecting
from raycv.common.files import read_json, record_of, unwritable
from raycv.results.run_folder import read_record
from raycv.utils import pin_kernels, set_seed


def test_the_commit_is_that_of_raycvs_own_checkout_and_of_no_other(tmp_path):
    """Installed in somebody's repository, raycv must not pass that repository's commit off as its own."""
    own = tmp_path / "own"
    shutil.copytree(Path(raycv.__file__).parent, own / "raycv", ignore=shutil.ignore_patterns("__pycache__"))
    foreign = shutil.copytree(own / "raycv", tmp_path / "foreign" / "site" / "raycv").parent
    for repository in (own, tmp_path / "foreign"):
        git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "x"], check=True)
    code = "from raycv.common.environment import describe_environment; print(describe_environment()['git'] is not None)"
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


# --- GPUs ------------------------------------------------------------------------------------------------------------

OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build  (root@host)\n"
needs_a_cpu_build = pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None, reason="this torch is built for GPUs"
)


@pytest.mark.parametrize(
    ("variables", "there"),
    [
        ({}, True),
        ({"CUDA_VISIBLE_DEVICES": "1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,0"}, True),
        ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-89"}, True),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, True),
        ({"HIP_VISIBLE_DEVICES": ""}, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, False),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, False),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, False),
    ],
)
def test_a_gpu_is_seen_without_torch_unless_the_cpu_is_asked_for(tmp_path, variables, there):
    expected = Gpu("NVIDIA", "470.82.01") if there else None
    assert visible_gpu(files_of_a_gpu(tmp_path), variables) == expected


def test_what_the_drivers_say_of_themselves(tmp_path):
    assert visible_gpu(files_of_a_gpu(tmp_path / "open", OPEN_DRIVER), {}) == Gpu("NVIDIA", "550.54.14")
    assert visible_gpu(files_of_a_gpu(tmp_path / "new", "nothing known"), {}) == Gpu("NVIDIA", None)
    # A container without GPUs on such a machine: the driver's own folder is not hidden from it.
    shutil.rmtree(files_of_a_gpu(tmp_path / "container") / "dev")
    assert visible_gpu(tmp_path / "container", {}) is None
    assert visible_gpu(tmp_path / "nothing", {}) is None
    # A processor with graphics of its own, and one on which somebody means to compute with it.
    (tmp_path / "amd/dev").mkdir(parents=True)
    (tmp_path / "amd/dev/kfd").touch()
    assert visible_gpu(tmp_path / "amd", {}) is None
    (tmp_path / "amd/opt/rocm").mkdir(parents=True)
    (tmp_path / "amd/sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "amd/sys/module/amdgpu/version").write_text("6.8.5\n")
    assert visible_gpu(tmp_path / "amd", {}) == Gpu("AMD", "6.8.5")
    # Windows' driver in WSL; without its library the device alone tells nothing.
    (tmp_path / "wsl/dev").mkdir(parents=True)
    (tmp_path / "wsl/dev/dxg").touch()
    assert visible_gpu(tmp_path / "wsl", {}) is None
    (tmp_path / "wsl/usr/lib/wsl/lib").mkdir(parents=True)
    (tmp_path / "wsl/usr/lib/wsl/lib/libcuda.so.1").touch()
    assert visible_gpu(tmp_path / "wsl", {}) == Gpu("NVIDIA", None)
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        assert visible_gpu(tmp_path / "amd", {name: "-1"}) is None


@needs_a_cpu_build
def test_a_gpu_that_torch_cannot_use_is_refused_by_driver_and_build(tmp_path, monkeypatch):
    """Here torch is built for CPUs alone: what is made up is the driver's files."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert inference_device("auto") == torch.device("cpu")
    monkeypatch.setattr(devices, "ROOT", files_of_a_gpu(tmp_path))
    found = (f"torch {torch.__version__}", "CPUs alone", f"NVIDIA GPU of {socket.gethostname()}", "(driver 470.82.01)")
    with refuses("gpu-unusable", *found, "infer.device=cpu"):
        inference_device("auto")
    assert inference_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with refuses("gpu-unusable", "(driver 470.82.01, CUDA_VISIBLE_DEVICES=1)", "a.b=c"):
        check_own_gpu("a.b=c")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert inference_device("auto") == torch.device("cpu")


@needs_a_cpu_build
def test_the_gpu_of_a_machine_that_only_joins_a_cluster_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "ROOT", files_of_a_gpu(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    check_gpu_before_ray("a.b=c")
    for address in ("local", "auto", ""):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with refuses("gpu-unusable", "(driver 470.82.01)", "a.b=c"):
            check_gpu_before_ray("a.b=c")


def test_a_full_disk_and_a_damaged_record_have_their_kinds(tmp_path):
    assert unwritable("x", tmp_path, OSError(errno.ENOSPC, "No space left on device")).kind == "disk-full"
    assert unwritable("x", tmp_path, PermissionError(errno.EACCES, "Permission denied")).kind == "disk-unwritable"
    (tmp_path / "record.json").write_text("{")
    for read in (read_json, read_record):
        with refuses("run-damaged", tmp_path / "record.json"):
            read(tmp_path / "record.json")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[]", "it is not a JSON object"),
        ("{}", "it lacks run, folds"),
        ('{"run": 1, "folds": []}', "it lacks run"),
        ('{"run": "a", "folds": {}}', "it lacks folds"),
    ],
)
def test_a_record_that_lacks_a_key_or_has_another_type_is_named(tmp_path, content, fault):
    path = tmp_path / "record.json"
    path.write_text(content)
    with refuses("run-damaged", f"{path} is damaged: {fault}.", "good copy"):
        read_record(path, "run", folds=list)
    path.write_text('{"run": "a", "folds": [], "more": 1}')
    assert read_record(path, "run", folds=list)["more"] == 1


def test_a_hidden_package_cannot_be_imported_until_the_block_ends():
    sys.modules.pop("wsgiref", None)
    with hidden("wsgiref", "json"):
        assert find_spec("wsgiref") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("wsgiref")
        assert importlib.import_module("json") is json  # imported before
    assert importlib.import_module("wsgiref")


@dataclass(frozen=True)
class Inner:
    count: int
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str | None
    fold: int | str
    word: Literal["a", "b"]
    each: list[list[Inner]] = field(default_factory=list)
    more: dict[str, str | None] | None = None
    free: Any = None


WHOLE = {"inner": {"count": 1, "share": 1}, "name": None, "fold": "best", "word": "b", "each": [[{"count": 2}], []]}


def test_a_record_is_read_from_json_with_the_types_of_its_fields():
    found = record_of(Outer, WHOLE | {"more": {"x": None}, "free": [1], "unknown": 3})
    assert found == Outer(Inner(1, 1.0), None, "best", "b", [[Inner(2)], []], {"x": None}, [1])
    assert type(found.inner.share) is float


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inner": {}}, "inner.count is missing"),
        ({"inner": 5}, "inner is '5', which should be an object"),
        ({"inner": {"count": True}}, "inner.count is 'True', which should be an integer"),
        ({"inner": {"count": 1.0}}, "inner.count is '1.0', which should be an integer"),
        ({"inner": {"count": 1, "share": "1"}}, "inner.share is '1', which should be a number"),
        ({"inner": {"count": 1, "share": False}}, "inner.share is 'False', which should be a number"),
        ({"inner": {"count": 1, "share": 10**400}}, "inner.share is "),
        ({"name": 5}, "name is '5', which should be a string"),
        ({"fold": None}, "fold is 'None', which should be an integer"),
        ({"word": "c"}, "word is 'c', which should be one of a, b"),
        ({"word": ["a"]}, "word is "),
        ({"each": [[{"count": 1}], [{"count": "x"}]]}, "each.1.0.count is 'x', which should be an integer"),
        ({"each": {}}, "each is '{}', which should be an object or a list"),
        ({"more": {"x": 1}}, "more.x is '1', which should be a string"),
    ],
)
def test_a_value_of_another_type_is_named_by_its_key(change, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        record_of(Outer, WHOLE | change)
    with pytest.raises(ValueError, match="it is "):
        record_of(Outer, [])
