"""Finds the files of a base model by its name: a folder, `raycv://...`, or an id on the hub (FR-001, FR-011)."""

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from raycv.common.locations import resolve
from raycv.common.retry import ATTEMPTS, BASE_SECONDS, ServiceError, call_with_retries, cause_of
from raycv.errors import UserError
from raycv.model.base_files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEXES,
    BaseFiles,
    check_not_quantised,
    find_entry,
    inspect_folder,
    is_small_file,
    listed_files,
    weight_files,
)
from raycv.model.hub import can_pass, explained_hub_errors, may_be_folder, single_attempts, without_hub

logger = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_base(name: str, revision: str | None, *, base_seconds: float = BASE_SECONDS) -> BaseFiles:
    """Returns the files of the base model `name`, and downloads them if needed (FR-001, FR-011).

    Several processes may call this at once. A commit that the cache holds needs no network.

    Args:
        name: A hub id, a folder, or `raycv://...`.
        revision: A branch, tag or commit on the hub; None means the main branch. A folder has none.
        base_seconds: The wait before the second attempt, in seconds.

    Raises:
        UserError: The files cannot be fetched or are not a base model. The message has the cause and the remedies.
    """
    location = resolve(name)
    if not is_folder(location):
        files = _from_hub(name, revision, base_seconds)
        check_not_quantised(name, files.path)
        return files
    if revision is not None:
        raise UserError(
            f"model.revision={revision} means nothing for model.name={name}, which is a folder.",
            kind="config-value",
            remedies=["set model.revision=null"],
        )
    files = inspect_folder(name, Path(os.path.expanduser(location)).absolute(), None)
    check_not_quantised(name, files.path)
    return files


def fetch_trained_base(name: str, revision: str | None, given: str | None) -> BaseFiles:
    """Returns the files of the base model that a checkpoint was trained on.

    Args:
        name: The base model's name in the checkpoint.
        revision: The base model's revision in the checkpoint. The hub must have exactly this commit.
        given: The folder or hub id where the base model is now; None if it is still under `name`.

    Raises:
        UserError: As `fetch_base`, with remedies for inference.
    """
    try:
        return fetch_base(given or name, None if given and is_folder(given) else revision)
    except UserError as error:
        # Inference does not have the keys of training, so we drop the remedies that name them.
        kept = [remedy for remedy in error.remedies if "model." not in remedy]
        where = "if it lies elsewhere now, say where: base=<folder or hub id>"
        raise UserError(
            f"raycv cannot get the checkpoint's base model. {error.what}", kind=error.kinds, remedies=[where, *kept]
        ) from error


def check_name(name: str, revision: str | None) -> None:
    """Checks a base model's name without network or torch: a folder's files, or the form of a hub id.

    Raises:
        UserError: `name` cannot be a base model.
    """
    if is_folder(resolve(name)):
        fetch_base(name, revision)
        return
    from huggingface_hub.utils import validate_repo_id

    with explained_hub_errors(name, revision):
        validate_repo_id(name)


def absolute_name(name: str) -> str:
    """Makes the name of a relative folder absolute, since other processes run in other folders. Other names stay."""
    return str(Path(os.path.expanduser(name)).absolute()) if is_folder(name) else name


def is_folder(name: str) -> bool:
    """Returns whether `name` means a folder, and not an id on the hub."""
    path = Path(os.path.expanduser(name))
    return path.is_absolute() or name.startswith(".") or os.path.isdir(path)


def _from_hub(name: str, revision: str | None, base_seconds: float) -> BaseFiles:
    """Returns the files of `name` from the cache or the hub (FR-011).

    Args:
        name: An id on the hub.
        revision: A branch, tag or commit; None means the main branch.
        base_seconds: The wait before the second attempt, in seconds.

    Raises:
        UserError: The hub refuses, `name` is not a complete model, or neither hub nor cache gives its files.
    """
    from huggingface_hub import constants

    wanted = revision or constants.DEFAULT_REVISION
    is_commit = _COMMIT.fullmatch(wanted) is not None
    if is_commit or constants.HF_HUB_OFFLINE:
        found = _cached(name, wanted)
        if found is not None and (constants.HF_HUB_OFFLINE or _may_have_a_tokenizer(found)):
            return found
        if constants.HF_HUB_OFFLINE:
            # huggingface_hub takes either variable for the same wish.
            switch = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
            raise UserError(
                f"{switch} is set, and {constants.HF_HUB_CACHE} does not hold {name} at revision {wanted}.",
                kind="hub-unreachable",
                remedies=[f"unset {switch}", *without_hub(name, revision)],
            )
    single_attempts()
    with explained_hub_errors(name, revision):
        try:
            commit, files = _listing(name, wanted, base_seconds)
        except ServiceError as error:
            found = _cached(name, wanted)
            if found is None:
                raise
            logger.warning(
                "the hub cannot be reached (%s): using commit %s of %s from the cache, which may not be the newest",
                *(cause_of(error.cause), found.revision, name),
            )
            return found
        if ADAPTER_CONFIG in files and CONFIG in files:
            logger.warning("%s also holds an adapter (%s): raycv loads the whole model alone", name, ADAPTER_CONFIG)
        found = _cached(name, commit, files) or _download(name, commit, files, base_seconds)
        if not is_commit:
            _remember(found.path, wanted, commit)
        return found


def _listing(name: str, revision: str, base_seconds: float) -> tuple[str, set[str]]:
    """Returns the commit behind `revision`, and the names of the files at the root of that commit."""
    from huggingface_hub import HfApi

    what = f"asking the hub for the files of {name}"
    info = call_with_retries(
        f"{name} is not a folder here, and {what}" if may_be_folder(name) else what,
        partial(HfApi().model_info, name, revision=revision),
        kind="hub-unreachable",
        passing=can_pass,
        # A mistyped folder must not wait for a hub that does not answer.
        attempts=1 if may_be_folder(name) else ATTEMPTS,
        remedies=without_hub(name, revision),
        base_seconds=base_seconds,
    )
    if info.sha is None or info.siblings is None:
        raise UserError(
            f"The hub's answer about {name} names no commit or no files.",
            kind="hub-unreachable",
            remedies=["check HF_ENDPOINT"],
        )
    return info.sha, {sibling.rfilename for sibling in info.siblings if "/" not in sibling.rfilename}


def _cached(name: str, revision: str, present: Iterable[str] = ()) -> BaseFiles | None:
    """Returns the files of `revision` in the cache, or None if the cache is known to lack some of them.

    It uses neither network nor lock.

    Args:
        name: An id on the hub.
        revision: A branch, tag or commit.
        present: The hub's list of files. The config and tokenizer files in it must be in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with explained_hub_errors(name, revision):
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    try:
        found = inspect_folder(name, folder, folder.name)
    except UserError as error:
        logger.info("the cache's copy of %s cannot be used as it is: %s", name, error.what)
        return None
    return found if {file for file in present if is_small_file(file)} <= found.files.keys() else None


def _may_have_a_tokenizer(files: BaseFiles) -> bool:
    """Returns whether files besides configs and weights are there. Other tools may have cached the model alone."""
    return any(is_small_file(file) and file not in (CONFIG, "generation_config.json") for file in files.files)


def _download(name: str, commit: str, present: set[str], base_seconds: float) -> BaseFiles:
    weight_format, entry = find_entry(name, present)
    small = {file for file in present if is_small_file(file)}
    if CONFIG not in small:
        raise UserError(
            f"{name} on the hub is not a model: it has no {CONFIG}.", kind="base-files", remedies=["check model.name"]
        )
    with _alone(name):
        # Another process may have downloaded the files while this one waited, so we look again.
        found = _cached(name, commit, present)
        if found is not None:
            return found
        # The weights come last, so a snapshot with all weights has all other files. `_cached` relies on that.
        folder = _snapshot(name, commit, small | ({entry} & INDEXES), base_seconds)
        check_not_quantised(name, folder)
        weights = set(weight_files(folder, entry))
        if not weights <= present:
            raise UserError(
                f"{name} on the hub is incomplete: {entry} names {listed_files(weights - present)}, "
                "which is not there.",
                kind="base-files",
                remedies=["choose another model.revision"],
            )
        logger.info("downloading %s at %s: %d %s file(s)", name, commit, len(weights), weight_format)
        _snapshot(name, commit, weights, base_seconds)
        return inspect_folder(name, folder, commit)


def _snapshot(name: str, commit: str, files: Iterable[str], base_seconds: float) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(file) for file in sorted(files)]
    fetch = partial(snapshot_download, name, revision=commit, allow_patterns=patterns)
    remedies = ["run again: the download resumes where it stopped", *without_hub(name, commit)]
    what = f"the download of {name} from the hub"
    path = call_with_retries(
        what, fetch, kind="hub-unreachable", passing=can_pass, remedies=remedies, base_seconds=base_seconds
    )
    return Path(path)


def _remember(snapshot: Path, revision: str, commit: str) -> None:
    """Writes the commit of `revision` into the cache, as huggingface_hub does, so that it is found without the hub."""
    reference = snapshot.parents[1] / "refs" / revision
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="utf-8")
    except OSError as error:
        # A cache that was made elsewhere may be read-only, so we only log this.
        logger.info("cannot note %s in the cache: %s", revision, cause_of(error))


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Lets one process at a time continue, among those that share the cache.

    The folds of a node therefore do not all fetch 13 GB at once.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE) / ".locks" / f"raycv--{name.replace('/', '--')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that downloads %s", name)
        lock.acquire()
    except NotImplementedError:
        logger.info("the file system of %s does not support locks: processes may fetch the same file", path.parent)
    try:
        yield
    finally:
        lock.release()
