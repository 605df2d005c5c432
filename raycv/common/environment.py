"""Describes the environment that every run records: versions, hardware, commit of the code."""

import gc
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raycv import __version__
from raycv.common.locations import PACKAGE
from raycv.errors import counted
from raycv.utils import NUMERICS

PACKAGES = (
    "raycv", "ray", "torch", "transformers", "peft", "accelerate", "scikit-learn", "mlflow", "hydra-core", "numpy",
    "pandas", "tokenizers", "safetensors", "huggingface_hub",
)  # fmt: skip


MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")


def utc_now() -> str:
    """The present time for a record: ISO 8601, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def recorded_moment(value: object) -> str | None:
    """`value` if it is a time in the format of `utc_now`; None for anything else."""
    return value if isinstance(value, str) and MOMENT.fullmatch(value) else None


SELDOM = 20_000
"""New objects between two garbage collections; the default of Python 3.11 is 700."""


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Collects garbage less often within the block.

    Imports of packages such as torch make no garbage, yet collection takes a sixth of their time.
    """
    before = gc.get_threshold()
    gc.set_threshold(SELDOM, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Within the block, a package that asks whether one of `packages` is installed finds that it is not.

    Packages that are imported already stay as they are.
    """
    lacking = dict.fromkeys(set(packages) - sys.modules.keys())
    # The import system takes None for a module that cannot be imported.
    sys.modules.update(lacking)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in lacking:
            sys.modules.pop(name, None)


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and the commit of the code, for `environment.json`. Imports no slow package."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "packages": {name: package_version(name) for name in PACKAGES},
        "numerics": NUMERICS,
        "git": code_state(),
    }


def describe_device(device: Any) -> str:
    """The name of a torch device for people: `NVIDIA H200`, or `cpu (2 threads)`."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({counted(torch.get_num_threads(), 'thread')})"


def package_version(name: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    if name == "raycv":  # A checkout runs without being installed, so it has no metadata.
        return __version__
    # The client of a scorer records no version, and would pay for this import.
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def code_state() -> dict[str, Any] | None:
    """The commit of the checkout that raycv runs from, and whether tracked files differ; None outside a checkout."""
    here = str(PACKAGE)
    try:
        if os.path.realpath(_git_says(here, "rev-parse", "--show-toplevel")) != os.path.dirname(os.path.realpath(here)):
            return None  # raycv is installed inside the repository of another project.
        commit = _git_says(here, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git_says(here, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_says(folder: str, *arguments: str) -> str:
    command = ["git", "-C", folder, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
