"""Runs in an object storage (s3://): publishes a local folder there and fetches it, part by part, with checksums.

The names of the objects are those of the files in the run folder. A part is the records of the run, the scores of a
fold, its checkpoint, or a training state. Each has a manifest with the checksums of its objects, which is written last:
a part without its manifest does not exist. The rest of raycv works with local copies (`raycv.common.locations`).
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from raycv.common.files import replaced, sha256_of, write_text
from raycv.common.locations import FETCHED, OBJECT_STORAGE, WORK, address_of, place_of, runs_folder
from raycv.common.retry import cause_of
from raycv.errors import UserError
from raycv.results.run_folder import RunFolder

T = TypeVar("T")
MANIFEST = ".published.json"
WHOLE = ".whole"
"""Marks a local copy all of which is published."""
FORMAT = 1
RECORDS = ""
"""The part with the files of the run folder itself, its tables and figures."""
PIECE = 2**23
"""Bytes that are sent or received at once."""
WAIT_SECONDS = 600.0
"""How long a run waits for a storage that does not answer, where it needs it to hand files on."""
UNREACHABLE = "storage-unreachable"
_REFUSED = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE|TOKEN|CREDENTIAL|HTTP status [34]|"
    r"Bucket '\S+' not found"
)
_REMEDIES = {
    "storage-refused": (
        "see to the bucket's name, and its region: AWS_DEFAULT_REGION",
        "see to the credentials on this machine, and their rights to list, read, write and delete there: aws s3 ls",
    ),
    UNREACHABLE: (
        "see to the network, and to AWS_ENDPOINT_URL if the storage is not that of AWS; then type the command again",
    ),
}


def in_words(error: OSError, what: str) -> UserError:
    """The error of pyarrow as one for the user, whose kind tells whether waiting can help. `what`: what failed."""
    kind = "storage-refused" if _REFUSED.search(str(error)) else UNREACHABLE
    why = re.sub(r".*(?=AWS Error)", "", cause_of(error), flags=re.DOTALL)
    said = "the object storage refuses it" if kind != UNREACHABLE else "the object storage does not answer"
    return UserError(f"{what}: {said} ({why}).", kind=kind, remedies=_REMEDIES[kind])  # type: ignore[arg-type]


class Bucket:
    """The objects below an address. Each method raises UserError if the storage does not answer, or refuses."""

    def __init__(self, address: str) -> None:
        """`address`: s3://bucket/folder."""
        self.address = address.rstrip("/")
        self._base = self.address.removeprefix(OBJECT_STORAGE)

    @cached_property
    def _files(self) -> Any:
        # The import takes half a second, and most runs are in folders.
        from pyarrow import fs

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if not region and not endpoint:
            region = fs.resolve_s3_region(self._base.partition("/")[0])
        return fs.S3FileSystem(
            region=region or None,
            endpoint_override=endpoint or None,
            connect_timeout=5,
            request_timeout=10,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
            # A small object is then one request.
            allow_delayed_open=True,
        )

    @contextmanager
    def _asked(self, what: str, name: str) -> Iterator[Any]:
        try:
            yield self._files
        except OSError as error:
            # Errors of local files have a number. Those of the storage have none, but that an object is missing.
            if error.errno is not None:
                raise
            raise in_words(error, f"{self.address}/{name} cannot be {what}".replace("/ cannot", " cannot")) from error

    def check(self) -> None:
        """Writes, lists and deletes an object, as a run will."""
        name = f".raycv-{secrets.token_hex(8)}"
        self.write(name, b"")
        self.list(name)
        self.delete(name)

    def list(self, folder: str = "") -> dict[str, float]:
        """The names of all objects below `folder`, with the times when they were written."""
        from pyarrow import fs

        with self._asked("listed", folder) as files:
            place = f"{self._base}/{folder}".rstrip("/")
            found = files.get_file_info(fs.FileSelector(place, allow_not_found=True, recursive=True))
            # A missing bucket counts as empty.
            if not found and files.get_file_info(bucket := self._base.partition("/")[0]).type == fs.FileType.NotFound:
                raise OSError(f"Bucket {bucket!r} not found")
        return {
            info.path.removeprefix(f"{self._base}/"): info.mtime.timestamp()
            for info in found
            if info.type == fs.FileType.File
        }

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None if it does not exist."""
        try:
            with self._asked("read", name) as files, files.open_input_file(f"{self._base}/{name}") as opened:
                return bytes(opened.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a small object, whole or not at all."""
        with self._asked("written", name) as files, files.open_output_stream(f"{self._base}/{name}") as opened:
            opened.write(content)

    def upload(self, name: str, file: Path) -> str:
        """Writes a local file as an object. Returns the SHA-256 of what was sent."""
        with (
            file.open("rb") as source,
            self._asked("written", name) as files,
            files.open_output_stream(f"{self._base}/{name}") as opened,
        ):
            return _copy(source, opened)

    def download(self, name: str, file: Path) -> str:
        """Writes an object as a local file, whole or not at all. Returns the SHA-256 of what came."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            replaced(file, private=True) as temporary,
            temporary.open("wb") as target,
            self._asked("read", name) as files,
            files.open_input_file(f"{self._base}/{name}") as opened,
        ):
            return _copy(opened, target)

    def delete(self, name: str) -> None:
        """Deletes an object, if it exists."""
        with suppress(FileNotFoundError), self._asked("deleted", name) as files:
            files.delete_file(f"{self._base}/{name}")

    def delete_folder(self, name: str) -> None:
        """Deletes all objects below `name`."""
        with suppress(FileNotFoundError), self._asked("deleted", name) as files:
            files.delete_dir(f"{self._base}/{name}")


def _copy(source: Any, target: Any) -> str:
    """Copies an open file into another, piece by piece. Returns the SHA-256 of its bytes."""
    digest = hashlib.sha256()
    while piece := source.read(PIECE):
        digest.update(piece)
        target.write(piece)
    return digest.hexdigest()


def fold_part(fold: int) -> str:
    """The part with the result and the scores of a fold."""
    return f"fold_{fold}"


def checkpoint_part(fold: int) -> str:
    """The part with the checkpoint of a fold."""
    return f"fold_{fold}/checkpoint"


def states_folder(fold: int) -> str:
    """The folder of a fold's training states, each of which is a part."""
    return f"fold_{fold}/state"


class PublishedRun:
    """A run in an object storage, and its local copy."""

    def __init__(self, runs: str, folder: RunFolder) -> None:
        """`runs`: the address of the folder of runs. `folder`: the local copy, which has the run's name."""
        self.folder = folder
        self.bucket = Bucket(f"{runs.rstrip('/')}/{folder.root.name}")

    @classmethod
    def of(cls, folder: RunFolder, *kinds: str) -> "PublishedRun | None":
        """The run of which `folder` is a local copy of one of `kinds`, at first of any; None for another folder."""
        found = (address_of(folder.root.parent, kind) for kind in kinds or (WORK, FETCHED))
        runs = next((one for one in found if one), None)
        return None if runs is None else cls(runs, folder)

    def manifest(self, part: str) -> dict[str, Any] | None:
        """The manifest of a part; None if the part is not published. Raises: UserError if it is damaged."""
        content = self.bucket.read(_below(part, MANIFEST))
        if content is None:
            return None
        with suppress(ValueError, AttributeError, KeyError):
            manifest: dict[str, Any] = json.loads(content)
            # A bucket may be written by others: a name may not lead out of the folder.
            if manifest["format"] == FORMAT and all(_is_safe(*item) for item in manifest["sha256"].items()):
                return manifest
        raise UserError(
            f"{self.bucket.address}/{_below(part, MANIFEST)} is damaged, or of another version of raycv.",
            kind="run-damaged",
            remedies=["publish the run again from where it ran: python -m raycv.aggregate run=<name> dir=s3://..."],
        )

    def publish(self, part: str) -> None:
        """Writes what the storage lacks of a local part, then its manifest, and deletes what the part has no more.

        Raises: UserError if the storage does not answer or refuses; OSError if a local file is gone.
        """
        manifest = self.manifest(part) or {}
        there, files = manifest.get("sha256", {}), self._local(part)
        sums = {}
        for name, file in files.items():
            sums[name] = sha256_of(file)
            if there.get(name) != sums[name]:
                sums[name] = self.bucket.upload(_below(part, name), file)
        content = {"format": FORMAT, "run": self._nonce() or manifest.get("run"), "sha256": sums}
        if content != manifest:
            self.bucket.write(_below(part, MANIFEST), json.dumps(content, indent=2).encode())
        for name in there.keys() - sums.keys():
            self.bucket.delete(_below(part, name))

    def fetch(self, part: str) -> bool:
        """Makes the local part equal to the published one. Returns whether it is published.

        Raises: UserError if the storage does not answer or refuses, or an object does not have its checksum.
        """
        wrong = ""
        for wait in (0, 1, 2):
            # A part that is published again has other objects for a moment.
            time.sleep(wait)
            manifest = self.manifest(part)
            if manifest is None:
                return False
            wrong = next((name for name, total in manifest["sha256"].items() if not self._has(part, name, total)), "")
            if not wrong:
                for name, file in self._local(part).items():
                    if name not in manifest["sha256"]:
                        file.unlink()
                return True
        raise UserError(
            f"{self.bucket.address}/{_below(part, wrong)} does not have its checksum: it is damaged, or half written.",
            kind="run-damaged",
            remedies=["wait until the run is published, and try again", "publish it again from where it ran"],
        )

    def _has(self, part: str, name: str, total: str) -> bool:
        """Whether the local file, fetched if need be, has the checksum `total`."""
        file = self.folder.root / part / name
        if file.is_file() and sha256_of(file) == total:
            return True
        try:
            return self.bucket.download(_below(part, name), file) == total
        except FileNotFoundError:
            return False

    def _local(self, part: str) -> dict[str, Path]:
        """The local files of a part, by their names in it."""
        root = self.folder.root / part
        if part == RECORDS:
            found = [
                path for path in root.rglob("*") if not re.match(r"fold_\d+/|ray/", path.relative_to(root).as_posix())
            ]
        elif part.count("/"):
            found = list(root.rglob("*"))
        else:
            files = self.folder.fold(int(part.removeprefix("fold_")))
            found = [files.predictions, files.epoch_scores, files.result]
        paths = {path.relative_to(root).as_posix(): path for path in sorted(found) if path.is_file()}
        return {name: path for name, path in paths.items() if not re.search(r"(^|/)\.", name)}

    def _nonce(self) -> str | None:
        return self.folder.share.read_text(encoding="utf-8") if self.folder.share.is_file() else None

    def published_folds(self, there: Mapping[str, float]) -> list[int]:
        """The folds that are published whole, among the objects `there` of the run."""
        found = (re.fullmatch(rf"fold_(\d+)/{re.escape(MANIFEST)}", name) for name in there)
        return sorted(int(match[1]) for match in found if match)

    def fetch_records(self) -> bool:
        """Fetches the records and the scores of all finished folds. Returns whether the run is published."""
        there = self.bucket.list()
        if not self.fetch(RECORDS):
            return False
        # `latest` is the newest run by this time.
        moment = there.get(self.folder.config.name, time.time())
        os.utime(self.folder.config, (moment, moment))
        folds = self.published_folds(there)
        for path in self.folder.root.glob("fold_*"):
            if path.name not in map(fold_part, folds):
                shutil.rmtree(path)
        for fold in folds:
            self.fetch(fold_part(fold))
        return True

    def newest_state(self, fold: int) -> str | None:
        """The name of the newest published training state of a fold."""
        there = self.bucket.list(states_folder(fold))
        found = [name.split("/")[-2] for name in there if name.endswith(f"/{MANIFEST}")]
        return max(found, default=None)

    def publish_all(self, folds: int) -> None:
        """Publishes all finished folds and the records, and deletes training states that nobody needs any more."""
        there = self.bucket.list()
        for fold in self.folder.finished(folds):
            self.publish(checkpoint_part(fold))
            self.publish(fold_part(fold))
            if any(name.startswith(f"{states_folder(fold)}/") for name in there):
                self.bucket.delete_folder(states_folder(fold))
        self.publish(RECORDS)
        if self.folder.report.is_file() and address_of(self.folder.root, WORK):
            (self.folder.root / WHOLE).touch()


def _below(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


def _is_safe(name: str, total: str) -> bool:
    steps = name.split("/")
    return bool(re.fullmatch("[0-9a-f]{64}", total)) and not any(step.startswith(".") or not step for step in steps)


def persistently(attempt: Callable[[], T], tell: Callable[[str], None], seconds: float | None = None) -> T:
    """Calls `attempt` again while the storage does not answer, and tells that it waits.

    `seconds`: how long at most; None for WAIT_SECONDS.

    Raises: UserError of the last attempt, or of one that waiting cannot help.
    """
    seconds = WAIT_SECONDS if seconds is None else seconds
    deadline, pause, told = time.monotonic() + seconds, 2.0, False
    while True:
        try:
            return attempt()
        except UserError as error:
            if error.kind != UNREACHABLE or time.monotonic() + pause > deadline:
                raise
            if not told:
                tell(f"{error.what} raycv tries again for up to {seconds:.0f} seconds.")
                told = True
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def fetched_run(runs: Path, name: str) -> RunFolder | None:
    """Fetches records and scores of the run `name` into the local copies in `runs`; None if it is not published."""
    folder = RunFolder(runs / name)
    run = PublishedRun.of(folder, FETCHED)
    assert run is not None
    return folder if run.fetch_records() else None


def published_runs(runs: Path) -> dict[str, dict[str, float]]:
    """The published runs whose local copies lie in `runs`, the newest last, each with its objects and their times."""
    there: dict[str, dict[str, float]] = {}
    for name, moment in Bucket(place_of(runs)).list().items():
        run, _, rest = name.partition("/")
        there.setdefault(run, {})[rest] = moment
    begun = {run: files for run, files in there.items() if MANIFEST in files}
    return dict(sorted(begun.items(), key=lambda item: (item[1].get("config.yaml", 0.0), item[0])))


def fetch_checkpoints(folder: RunFolder, folds: Sequence[int]) -> None:
    """Fetches the checkpoints of folds, if `folder` is a local copy of a reading command."""
    run = PublishedRun.of(folder, FETCHED)
    if run is not None:
        for fold in folds:
            run.fetch(checkpoint_part(fold))


def publish_records(folder: RunFolder) -> None:
    """Publishes changed records of a fetched run. Raises: UserError, which names the local copy."""
    run = PublishedRun.of(folder, FETCHED)
    if run is None:
        return
    try:
        run.publish(RECORDS)
    except UserError as error:
        kept = f"{error.what} What was made is in {folder.root}."
        raise UserError(kept, kind=error.kinds, remedies=error.remedies) from error


def bring_up_to_date(place: str, name: str, folds_of: Callable[[Path], int]) -> None:
    """Publishes what the local copy of a run that ended here has and the storage lacks, then removes that copy.

    `place`: the folder of runs. `folds_of`: reads the number of folds from the config of a run.
    """
    folder = RunFolder(runs_folder(place, WORK) / name)
    run = PublishedRun.of(folder, WORK)
    if run is None or not folder.config.is_file():
        return
    from filelock import FileLock, Timeout

    # The process that holds the lock publishes the run itself.
    with suppress(Timeout), FileLock(folder.lock, timeout=0):
        check_same(run)
        run.publish_all(folds_of(folder.config))
        retire(folder)


def check_same(run: PublishedRun) -> None:
    """Raises: UserError if the published run of that name is another one than the local copy."""
    manifest = run.manifest(RECORDS)
    nonce = run.folder.share
    if manifest is None or not nonce.is_file() or manifest.get("run") == nonce.read_text(encoding="utf-8"):
        return
    raise UserError(
        f"{run.folder.root} is the local copy of another run than {run.bucket.address}.",
        kind="run-exists",
        remedies=[f"move it away: mv {run.folder.root} <folder>", "choose another run.name"],
    )


def resumable_copies(runs: Path, name: str | None) -> None:
    """Fetches what local copies in `runs` lack to be resumed, if they are those of an object storage.

    Args:
        runs: The folder of local copies of runs under way, or an ordinary folder, which stays as it is.
        name: The run; None for the newest that has no report.

    Raises:
        UserError: The storage does not answer or refuses, or the local copy is one of another run.
    """
    if address_of(runs, WORK) is None:
        return
    there = published_runs(runs)
    if name is None:
        begun = [run for run, files in there.items() if not {"report.json", "reproduction.json"} & files.keys()]
        name = next(reversed(begun), None)
    if name in there:
        _fetch_to_resume(RunFolder(runs / name), there[name])


def _fetch_to_resume(folder: RunFolder, there: Mapping[str, float]) -> None:
    """Fetches the records and the finished folds of a run. The local copy keeps the rest."""
    run = PublishedRun.of(folder, WORK)
    assert run is not None
    check_same(run)
    manifest = run.manifest(RECORDS) or {}
    if not (folder.report.is_file() and folder.report.name not in manifest.get("sha256", {})):
        run.fetch(RECORDS)
        os.utime(folder.config, (there[folder.config.name],) * 2)
    if manifest.get("run"):
        write_text(folder.share, str(manifest["run"]))
    for fold in run.published_folds(there):
        run.fetch(checkpoint_part(fold))
        run.fetch(fold_part(fold))


def retire(folder: RunFolder) -> None:
    """Moves the local copy of a run that is published whole to those that may be deleted."""
    address = address_of(folder.root.parent, WORK)
    if address is None or not (folder.root / WHOLE).is_file():
        return
    target = runs_folder(address) / folder.root.name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    for own in (folder.root / WHOLE, folder.lock, folder.share):
        own.unlink(missing_ok=True)
    # Both lie in one cache folder, so this is a rename.
    os.replace(folder.root, target)
