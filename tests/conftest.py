"""Shared set-up: what a test process may not take from the machine, and small trained pieces."""

import logging
import os
import shutil
import signal
import tempfile

# Before any import of ray: tests start their own local cluster, never join one that happens to run here.
os.environ.pop("RAY_ADDRESS", None)
# For clusters made in the test process; runs in a process of their own start without it, as a user's do.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
# As raycv/model/__init__.py does: pytest may import huggingface_hub, through another package, before raycv.
os.environ["HF_HUB_DISABLE_XET"] = "1"
# Toy tensors: a second thread only waits, and makes tests crawl on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support")

from support.interrupted_runs import whole  # noqa: F401, E402

# The same examples in every run: a commit passes everywhere or nowhere. A search for new ones:
# pytest --hypothesis-profile=default
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

# A shell's background job ignores Ctrl-C, one under nohup SIGHUP, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    """Where tests run side by side, the Rays of each process get a folder of their own."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Ray's sockets lie in it, and the path of a socket is short.
        os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="rc")
        config.add_cleanup(lambda: shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True))


def pytest_collection_finish():
    """Out of memory collects garbage, which takes 0.3 s where all that pytest and torch imported is looked through."""
    import gc

    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_logging():
    """A command that ran in this process keeps its warnings for stderr, where pytest does not look.

    One that is refused early leaves logging as Hydra set it: raycv's loggers disabled, the root's level raised.
    """
    level = logging.root.level
    yield
    logging.root.setLevel(level)
    logger = logging.getLogger("raycv")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    for name, known in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "raycv" and isinstance(known, logging.Logger):
            known.disabled = False


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    """accelerate keeps precision and device in a process-wide singleton; production has one trainer a process."""
    yield
    import sys

    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def unusable_gpu(tmp_path, monkeypatch):
    """A GPU that torch cannot use, in the files below `tmp_path / "root"`; the machine's own one needs `no_gpu`."""
    from support.builders import files_of_a_gpu

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("raycv.common.devices.ROOT", files_of_a_gpu(tmp_path / "root"))
