"""Fetches a base model from the Hugging Face hub once for all folds: retries, cache, offline mode (FR-011)."""

import difflib
import errno
import glob
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from raycv.common.files import is_full, unwritable
from raycv.common.retry import ATTEMPTS, ServiceError, call_with_retries, cause_of, is_passing, status_of
from raycv.common.secrets import mask_secrets
from raycv.errors import UserError, shown
from raycv.model.base_files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEXES,
    BaseFiles,
    find_entry,
    inspect_folder,
    is_small_file,
    listed_files,
    weight_files,
)

logger = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_from_hub(name: str, revision: str | None, base_seconds: float) -> BaseFiles:
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
        if found is not None:
            return found
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold {name} at revision {wanted}.",
                kind="hub-unreachable",
                remedies=["unset HF_HUB_OFFLINE", *_without_hub(name, revision)],
            )
    _single_attempts()
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
        f"{name} is not a folder here, and {what}" if _may_be_folder(name) else what,
        partial(HfApi().model_info, name, revision=revision),
        kind="hub-unreachable",
        passing=_can_pass,
        # A mistyped folder must not wait for a hub that does not answer.
        attempts=1 if _may_be_folder(name) else ATTEMPTS,
        remedies=_without_hub(name, revision),
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
    remedies = ["run again: the download resumes where it stopped", *_without_hub(name, commit)]
    what = f"the download of {name} from the hub"
    path = call_with_retries(
        what, fetch, kind="hub-unreachable", passing=_can_pass, remedies=remedies, base_seconds=base_seconds
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


class _HubError(ConnectionError):
    """A failed request. huggingface_hub neither repeats it nor returns an incomplete snapshot for it."""

    def __init__(self, message: str, response: Any = None) -> None:
        super().__init__(message)
        self.response = response


@cache
def _single_attempts() -> None:
    """Makes each request of huggingface_hub fail at once, so that only `call_with_retries` repeats it (FR-011).

    On its own, huggingface_hub 0.36 sends a failing request 6 times, so three attempts would be 18 requests.
    It waits forever for a list of files, and returns an incomplete snapshot if that list fails.
    It still resumes a stream that breaks off: a download of 13 GB may break off more often than three times.
    """
    import requests
    from huggingface_hub import configure_http_backend, constants
    from requests.adapters import HTTPAdapter

    class SingleAttempt(HTTPAdapter):
        def send(self, request: Any, *args: Any, **options: Any) -> Any:
            options["timeout"] = options.get("timeout") or constants.HF_HUB_ETAG_TIMEOUT
            try:
                response = super().send(request, *args, **options)
            except (requests.ConnectionError, requests.Timeout) as error:
                raise _HubError(f"no answer to {request.method} {request.url} ({_root(error)})") from error
            if response.status_code == 429 or response.status_code >= 500:
                raise _HubError(f"HTTP {response.status_code} for {request.method} {request.url}", response)
            return response

    def session() -> requests.Session:
        made = requests.Session()
        for scheme in ("http://", "https://"):
            made.mount(scheme, SingleAttempt())
        return made

    configure_http_backend(session)


def _root(error: BaseException) -> str:
    """Returns the innermost cause, which is the clearest: `Connection refused` instead of four wrappers around it."""
    link = error
    while link.__cause__ or link.__context__:
        link = link.__cause__ or link.__context__ or link
    return cause_of(link)


def _can_pass(error: Exception) -> bool:
    # huggingface_hub raises an `OSError` with this text if a file ends early without a network error.
    return is_passing(error) or "Consistency check failed" in str(error)


@contextmanager
def explained_hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns errors of huggingface_hub into `UserError`. Errors of unknown types stay unchanged."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(
            f"model.name={shown(name)} is neither a folder on this machine nor an id on the hub.",
            kind="base-files",
            remedies=[
                *_near_folders(name),
                "give a hub id such as klyang/MentaLLaMA-chat-7B",
                "give the absolute path of a folder",
            ],
        ) from error
    except OSError as error:
        # Errors of requests and huggingface_hub are instances of `OSError` as well.
        raise _refusal(error, name, revision) or _disk_fault(error, name, revision) from error


def _refusal(error: OSError, name: str, revision: str | None) -> UserError | None:
    """Returns the error for a refusal by the hub that no second attempt would change: 401, 403, 404. Else None."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it, on every node"
    url = mask_secrets(f"{constants.ENDPOINT}/{name}")
    status = status_of(error)
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{name} is gated (HTTP {status}): its owner gives access to accounts that accept its license.",
            kind="hub-access",
            remedies=[f"open {url} and accept the license with your account", log_in],
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{name} has no revision {revision or constants.DEFAULT_REVISION} on the hub.",
            kind="hub-access",
            remedies=[f"choose a branch, tag or commit from {url}/commits, or set model.revision=null"],
        )
    if status in (401, 403, 404):
        what = (
            f"{name} is not a folder here, and the hub has no such model"
            if _may_be_folder(name)
            else f"The hub has no {name}"
        )
        return UserError(
            f"{what} that you may read (HTTP {status}): it does not exist, or it is private or gated.",
            kind="hub-access",
            remedies=[*_near_folders(name), f"check the spelling of model.name: does {url} exist?", log_in],
        )
    return None


def _disk_fault(error: OSError, name: str, revision: str | None) -> UserError:
    """Returns the error for any other fault: of this machine's disk, or an answer that is not the hub's."""
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    # The last two occur if HOME is missing or is not a folder.
    if is_full(error) or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        where = "set HF_HOME to a folder on a disk with room that you may write to, on every node"
        return unwritable(name, Path(cache), error, [where])
    return UserError(
        f"{name} cannot be fetched from the hub: {cause_of(error)}.",
        kind="hub-unreachable",
        remedies=[
            "behind a proxy that has a certificate of its own: set REQUESTS_CA_BUNDLE to its file",
            *_without_hub(name, revision),
        ],
    )


def _may_be_folder(name: str) -> bool:
    """Returns whether `name` is most likely a misspelt folder: nearly all ids on the hub have an owner and a slash."""
    return "/" not in name


def _near_folders(name: str) -> list[str]:
    """Returns a remedy for the case that `name` is a misspelt folder; empty if it cannot be one."""
    path = Path(name)
    if not path.parent.is_dir():
        return []
    names = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir() if each.is_dir()], n=1)
    near = f"; did you mean {path.parent / names[0]}?" if names else ""
    return [f"if a folder is meant: there is no {path.absolute()}{near}"]


def _without_hub(name: str, revision: str | None) -> list[str]:
    from huggingface_hub import constants

    at = f" --revision {revision}" if revision not in (None, constants.DEFAULT_REVISION) else ""
    return [
        *_near_folders(name),
        "check the network of this node, and HTTPS_PROXY if there is a proxy",
        f"set HF_ENDPOINT to a mirror (now {mask_secrets(constants.ENDPOINT)})",
        f"download it beforehand where there is a network: `hf download {name}{at}`, then copy HF_HOME over",
        "set model.name to the absolute path of a folder that holds the model",
    ]
