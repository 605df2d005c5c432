"""Training states on disk: safetensors and JSON with checksums, written whole or not at all."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of

from raycv.common.files import AFRESH, unwritable, write_text
from raycv.common.numerics import FIRST_NUMERICS, NUMERICS
from raycv.errors import RunFailedError, UserError

FORMAT = 1
"""How a state is written. Whoever changes it raises it by one."""
TENSORS, FACTS, MANIFEST = "tensors.safetensors", "facts.json", "manifest.json"
WRITER = "writer"
DAMAGES = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""What reading a damaged state may raise."""


@dataclass(frozen=True)
class TrainState:
    """All that training needs to go on as if it had never stopped."""

    epoch: int
    """epochs that are done"""
    step: int
    """optimizer steps that are done of the next one"""
    facts: dict[str, Any]
    """plain values, as JSON holds them"""
    tensors: dict[str, torch.Tensor]
    """while training goes on these are the live ones: write or copy them at once"""

    def __str__(self) -> str:
        return f"epoch {self.epoch}" + (f" and step {self.step} of the next" if self.step else "")


class StateFolder:
    """The states of one fold, a folder each, named by how far they are. The one before the newest is kept.

    One process writes, several may read. Files can be read by the user alone.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._good: Path | None = None
        """the last one that was written or read here, so known to be whole"""
        self._writer = secrets.token_hex(8)

    def take(self) -> None:
        """Makes this process the one that writes. Another, whose cluster or node was lost, may live on for a while.

        Raises: UserError if the folder cannot be written.
        """
        with self._writing():
            # Not the run's folder itself, which the driver alone makes.
            for folder in (self.root.parent, self.root):
                folder.mkdir(exist_ok=True)
            write_text(self.root / WRITER, self._writer)

    def check_writer(self) -> None:
        """Raises: RunFailedError if this process did not take the folder, or another has taken it since."""
        try:
            writer = (self.root / WRITER).read_text()
        except FileNotFoundError:
            writer = ""
        if writer != self._writer:
            raise RunFailedError(f"Another process trains the fold of {self.root}, or has finished it: this one ends.")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedies = ["resume the run when the folder can be written: it goes on from the last one"]
            raise unwritable("The training state", self.root, error, remedies) from error

    def save(self, state: TrainState) -> None:
        """Writes `state` beside the others, takes it in when it is whole, and removes all but it and the one before.

        Raises: UserError if it cannot be written; the earlier states are then still there. RunFailedError as
        `check_writer`.
        """
        self.check_writer()
        target = self.root / f"{state.epoch:06}-{state.step:09}"
        with self._writing():
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self.root, ignore_cleanup_errors=True) as temporary:
                whole = Path(temporary) / "state"
                _write(whole, state)
                # One of that name is damaged, or this one would not be written.
                shutil.rmtree(target, ignore_errors=True)
                os.replace(whole, target)
            _sync(self.root)
        keep = {self.root / WRITER, target, self._good}
        self._good = target
        for path in self.root.iterdir():
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def check(self) -> None:
        """Raises: UserError if a state cannot be continued here, since another version of raycv wrote it."""
        for path in self._paths():
            with suppress(*DAMAGES):
                _manifest(path)

    def newest(self, warn: Callable[[str], None]) -> TrainState | None:
        """The newest state that is whole; None if there is none. Each that is passed over is told to `warn`.

        Raises: UserError as `check`: the fold would start afresh, or continue with another arithmetic.
        """
        for path in self._paths():
            try:
                state = _read(path)
            except DAMAGES as error:
                warn(f"the training state {path.name} is damaged and passed over ({_reason(error)})")
                continue
            self._good = path
            return state
        return None

    def _paths(self) -> list[Path]:
        """The states, the newest first."""
        return sorted(self.root.glob("[0-9]*"), reverse=True)


def _write(folder: Path, state: TrainState) -> None:
    facts = {"epoch": state.epoch, "step": state.step, "facts": state.facts}
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    files = {TENSORS: bytes_of(tensors), FACTS: _json(facts)}
    folder.mkdir(mode=0o700)
    for name, content in files.items():
        _write_file(folder / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    # Last of all: a folder without it is not whole.
    _write_file(folder / MANIFEST, _json({"format": FORMAT, "numerics": NUMERICS, "sha256": sums}))
    _sync(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a state. Raises: UserError if its format or its arithmetic is another than this raycv's."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    then = {
        "format": int(manifest["format"]),
        "number of the arithmetic": int(manifest.get("numerics", FIRST_NUMERICS)),
    }
    for what, now in (("format", FORMAT), ("number of the arithmetic", NUMERICS)):
        if then[what] != now:
            raise UserError(
                f"The training state {folder} was written by another version of raycv: its {what} is {then[what]}, and "
                f"this version has {now}.",
                remedies=[
                    "resume with the raycv that began the run: its environment.json names version and commit",
                    AFRESH,
                ],
            )
    return manifest


def _read(folder: Path) -> TrainState:
    manifest = _manifest(folder)
    # The bytes that were checked are those that are used.
    content = {name: (folder / name).read_bytes() for name in (TENSORS, FACTS)}
    for name, part in content.items():
        if hashlib.sha256(part).hexdigest() != manifest["sha256"][name]:
            raise ValueError(f"{name} does not have its checksum")
    return TrainState(**json.loads(content[FACTS]), tensors=tensors_of(content[TENSORS]))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"it has no {Path(error.filename).name}"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | KeyError | TypeError):
        return f"its {MANIFEST} cannot be read"
    return str(error)


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _write_file(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        # A name that outlives a power cut without its content would be a damaged state.
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
