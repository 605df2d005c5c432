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

from raycv.common.files import unwritable, write_text
from raycv.errors import RunFailedError, UserError
from raycv.utils import FIRST_NUMERICS, NUMERICS

FORMAT = 1
"""The format of a training state. Raise it by one when you change the format."""
TENSORS, FACTS, MANIFEST = "tensors.safetensors", "facts.json", "manifest.json"
WRITER = "writer"
DAMAGES = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""The errors that reading a damaged training state may raise."""


@dataclass(frozen=True)
class TrainState:
    """All that training needs to resume as if it had never stopped."""

    epoch: int
    """finished epochs"""
    step: int
    """finished optimizer steps of the next epoch"""
    facts: dict[str, Any]
    """plain values that JSON can hold"""
    tensors: dict[str, torch.Tensor]
    """the live tensors while training runs: write or copy them at once"""

    def __str__(self) -> str:
        return f"epoch {self.epoch}" + (f" and step {self.step} of the next" if self.step else "")


class StateFolder:
    """The training states of one fold, each in a folder with its progress as the name.

    It keeps the newest state and the one before. One process writes, several may read. Only the user can read the
    files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._good: Path | None = None
        """the last state that was written or read here, which is therefore whole"""
        self._writer = secrets.token_hex(8)

    def take(self) -> None:
        """Makes this process the writer. Another, on a lost cluster or node, may still run for a while.

        Raises:
            UserError: The folder cannot be written.
        """
        with self._writing():
            # Only the driver makes the run's folder itself, so we make only the two folders below it.
            for folder in (self.root.parent, self.root):
                folder.mkdir(exist_ok=True)
            write_text(self.root / WRITER, self._writer)

    def check_writer(self) -> None:
        """Checks that this process is the writer.

        Raises:
            RunFailedError: This process did not take the folder, or another has taken it since.
        """
        try:
            writer = (self.root / WRITER).read_text()
        except FileNotFoundError:
            writer = ""
        if writer != self._writer:
            raise RunFailedError(
                f"Another process trains the fold of {self.root}, or has finished it: this one ends.", kind="run-busy"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedies = ["resume the run when the folder can be written: it starts from the last one"]
            raise unwritable("The training state", self.root, error, remedies) from error

    def save(self, state: TrainState) -> Path:
        """Writes `state` in full, moves it to its place, and removes all states but it and the one before.

        Returns:
            The folder of the state.

        Raises:
            UserError: `state` cannot be written. The earlier states then still exist.
            RunFailedError: As `check_writer`.
        """
        self.check_writer()
        target = self.root / f"{state.epoch:06}-{state.step:09}"
        with self._writing():
            with tempfile.TemporaryDirectory(prefix=".new-", dir=self.root, ignore_cleanup_errors=True) as temporary:
                whole = Path(temporary) / "state"
                _write(whole, state)
                # A state of that name is damaged, since otherwise training would have resumed from it. We therefore
                # remove it.
                shutil.rmtree(target, ignore_errors=True)
                os.replace(whole, target)
            _sync(self.root)
        keep = {self.root / WRITER, target, self._good}
        self._good = target
        for path in self.root.iterdir():
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)
        return target

    def check(self) -> None:
        """Checks that this version of raycv can resume from the states.

        Raises:
            UserError: It cannot resume from one, since another version of raycv wrote it.
        """
        for path in self._paths():
            with suppress(*DAMAGES):
                _manifest(path)

    def newest(self, warn: Callable[[str], None]) -> TrainState | None:
        """Returns the newest state that is whole, or None if all are damaged or the folder is empty.

        Args:
            warn: Receives a warning for each damaged state that is skipped.

        Raises:
            UserError: As `check`. Otherwise the fold would restart from the beginning, or continue with another
                arithmetic.
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
        """Returns the folders of the states, the newest first."""
        return sorted(self.root.glob("[0-9]*"), reverse=True)


def _write(folder: Path, state: TrainState) -> None:
    facts = {"epoch": state.epoch, "step": state.step, "facts": state.facts}
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    files = {TENSORS: bytes_of(tensors), FACTS: _json(facts)}
    folder.mkdir(mode=0o700)
    for name, content in files.items():
        _write_file(folder / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    # A folder without a manifest is not whole, so we write the manifest last.
    _write_file(folder / MANIFEST, _json({"format": FORMAT, "numerics": NUMERICS, "sha256": sums}))
    _sync(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a training state.

    Raises:
        UserError: Its format or its arithmetic differs from this raycv's.
    """
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
                kind="package-version",
                remedies=[
                    "resume with the raycv that began the run: its environment.json names version and commit",
                    "start afresh under a new name: python -m raycv.run run.name=<new> ...",
                ],
            )
    return manifest


def _read(folder: Path) -> TrainState:
    manifest = _manifest(folder)
    # We use the bytes that we checked, since the file may change between two reads.
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
        # After a power cut, a name without its content would be a damaged state, so we write the content to disk.
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
