"""The base model's files: found in a folder, or fetched from the hub once for all folds (FR-001, FR-011)."""

import difflib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raycv.errors import UserError, shown
from raycv.paths import resolve, sha256_of
from raycv.retry import BASE_SECONDS, ServiceError, call_with_retries, cause_of, is_passing, mask_secrets, status_of

if TYPE_CHECKING:
    pass

WeightFormat = Literal["safetensors", "pytorch_bin"]

CONFIG = "config.json"

# In order of preference: the weights in one file, or the index that names the shards.
_ENTRIES: tuple[tuple[WeightFormat, str, str], ...] = (
    ("safetensors", "model.safetensors", "model.safetensors.index.json"),
    ("pytorch_bin", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_INDEXES = frozenset(index for _, _, index in _ENTRIES)
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's: where transformers finds it, it loads the base model that it names instead of the weights beside it."""
RARE = ("bpe.codes", "dict.txt", "*.spm", "prophetnet.tokenizer")
"""Vocabularies of a few tokenizers, which earlier versions did not record."""
# Config and tokenizer files: JSON, sentencepiece models, WordPiece and BPE vocabularies. Never code, nor an adapter.
_SMALL = ("*.json", "*.model", "vocab*", "merges*.txt", *RARE)
_ADAPTER = "adapter_*"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GIT_LFS_POINTER = b"version https://git-lfs"
WHOLE_BYTES, BLOCK_BYTES, SAMPLE_BYTES = 64 * 2**20, 2 * 2**20, 4096
"""Up to what size a file's sum is that of all of it; of a larger one, how much of each block is read."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseFiles:
    """The files of one base model, complete and on this node."""

    name: str
    """as the config has it: hub id, folder, or raycv://..."""
    path: Path
    """the folder that holds the files"""
    revision: str | None
    """commit on the hub; None for a folder"""
    weight_format: WeightFormat
    files: Mapping[str, int]
    """the files that may be read, and no others: name -> bytes"""

    def sums(self) -> dict[str, str]:
        """What tells the files from another model's: name -> SHA-256 (of samples, where a file is large)."""
        return {file: _sha256(self.path / file) for file in self.files}

    def describe(self, tokenizer: Any, config: Any) -> dict[str, Any]:
        """What was found, as plain values for `environment.json`; `tokenizer` and `config` were loaded from here."""
        return {
            "name": self.name,
            "revision": self.revision,
            "weight_format": self.weight_format,
            "files": dict(self.files),
            "sha256": self.sums(),
            "architectures": list(config.architectures or []),
            "model_type": config.model_type,
            "vocab_size": config.vocab_size,
            "tokenizer": type(tokenizer).__name__,
            "tokenizer_is_fast": bool(tokenizer.is_fast),
            "tokenizer_size": len(tokenizer),
            "pad_token": tokenizer.pad_token,
            "pad_token_id": tokenizer.pad_token_id,
        }


# ---------------------------------------------------------------------------------------------------------- files


def fetch_base(name: str, revision: str | None, *, base_seconds: float = BASE_SECONDS) -> BaseFiles:
    """The files of base model `name`, downloaded if need be; several processes may call it at once (FR-001, FR-011).

    `name` is a hub id, a folder, or raycv://...; `revision` a branch, tag or commit of the hub, None for main.
    A commit that the cache holds costs no network. `base_seconds` is the wait before the second attempt.

    Raises: UserError if the files cannot be had or are no model, with the cause and what to do.
    """
    location = resolve(name)
    if not is_folder(location):
        return _from_hub(name, revision, base_seconds)
    if revision is not None:
        raise UserError(
            f"model.revision={revision} means nothing for model.name={name}, which is a folder.",
            remedies=["set model.revision=null"],
        )
    return _inspect(name, Path(os.path.expanduser(location)).absolute(), None)


def fetch_trained_base(name: str, revision: str | None, given: str | None) -> BaseFiles:
    """The base of a checkpoint, which says `name` and `revision`, or from where it is `given` to lie now.

    Raises: UserError as `fetch_base`, with what inference can do; the hub has to have training's very commit.
    """
    try:
        return fetch_base(given or name, None if given and is_folder(given) else revision)
    except UserError as error:
        # The keys of training are none of inference's.
        kept = [remedy for remedy in error.remedies if "model." not in remedy]
        where = "if it lies elsewhere now, say where: base=<folder or hub id>"
        raise UserError(f"The checkpoint's base model cannot be had. {error.what}", remedies=[where, *kept]) from error


def check_name(name: str, revision: str | None) -> None:
    """What can be known of a base model without network or torch: a folder's files, or the form of a hub id.

    Raises: UserError if it cannot be one.
    """
    if is_folder(resolve(name)):
        fetch_base(name, revision)
        return
    from huggingface_hub.utils import validate_repo_id

    with _explained(name, revision):
        validate_repo_id(name)


def absolute_name(name: str) -> str:
    """`name` with a relative folder made absolute, all else unchanged: for the driver, as workers run elsewhere."""
    return str(Path(os.path.expanduser(name)).absolute()) if is_folder(name) else name


def is_folder(name: str) -> bool:
    """Whether `name` means a folder, not an id on the hub."""
    path = Path(os.path.expanduser(name))
    return path.is_absolute() or name.startswith(".") or os.path.isdir(path)


def _inspect(name: str, folder: Path, revision: str | None) -> BaseFiles:
    """Raises: UserError if `folder` does not hold a config and all of the weights."""
    if not os.path.isdir(folder):
        raise UserError(f"There is no folder {folder}, which is to hold the base model.", remedies=["correct the path"])
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if CONFIG not in present:
        raise UserError(
            f"{folder} is no model: it has no {CONFIG}; it holds {_listed(present)}.",
            remedies=[
                "model.name wants a base model; a fold's checkpoint is an adapter, which belongs on top of one"
                if ADAPTER_CONFIG in present
                else "set model.name to a folder written by save_pretrained or by `hf download`"
            ],
        )
    weight_format, entry = _entry(name, present)
    weights = _weights(folder, entry)
    faults = [file for file in weights if file not in present or _is_pointer(folder / file)]
    if faults:
        raise UserError(
            f"{folder} lacks weights: {_listed(faults)} missing, or only a git-lfs pointer.",
            remedies=[
                "copy or download the folder again",
                "after a git clone without git-lfs: `git lfs install && git lfs pull` in that folder",
            ],
        )
    if ADAPTER_CONFIG in present and revision is None:
        raise UserError(
            f"{folder} holds a whole model and an adapter ({ADAPTER_CONFIG}): raycv trains on the whole model alone.",
            remedies=_without_adapter(folder),
        )
    used = sorted({file for file in present if _is_small(file)} | {entry, *weights})
    return BaseFiles(name, folder, revision, weight_format, {file: (folder / file).stat().st_size for file in used})


def _entry(name: str, present: Iterable[str]) -> tuple[WeightFormat, str]:
    """Format and entry file of the weights among the files `present`: safetensors if there are any, else .bin."""
    names = set(present)
    for weight_format, single, index in _ENTRIES:
        for entry in (single, index):
            if entry in names:
                return weight_format, entry
    raise UserError(
        f"The base model {name} has no weights that PyTorch can read; it holds {_listed(names)}.",
        remedies=[
            "choose a model with model.safetensors or pytorch_model.bin, whole or in shards (GGUF, GPTQ, TensorFlow "
            "and .pth files cannot be fine-tuned here)"
        ],
    )


def _weights(folder: Path, entry: str) -> list[str]:
    """The weight files behind `entry`, whether they are there or not."""
    if entry not in _INDEXES:
        return [entry]
    try:
        shards = sorted(set(json.loads((folder / entry).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{folder / entry} is damaged: {cause_of(error)}.", remedies=["copy or download the folder again"]
        ) from error
    # The index comes from outside: it must not lead out of the folder.
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise UserError(f"{folder / entry} does not name plain files of its own folder; it is not used.")
    return shards


def _without_adapter(folder: Path) -> list[str]:
    """What to do with a folder that holds an adapter beside a whole model."""
    here, aside = (shlex.quote(str(path)) for path in (folder, folder.with_name(f"{folder.name}-adapter")))
    return [
        f"if the whole model is meant, move the adapter away: mkdir {aside} && mv {here}/{_ADAPTER} {aside}/",
        "if the adapter is meant, merge it into its base and give that folder: PeftModel.from_pretrained(base, "
        f"{str(folder)!r}).merge_and_unload().save_pretrained(<new folder>)",
    ]


def _is_small(file: str) -> bool:
    if file in _INDEXES or fnmatch(file, _ADAPTER):
        return False
    return any(fnmatch(file, pattern) for pattern in _SMALL)


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER


def _sha256(path: Path) -> str:
    """SHA-256 of a file; of one of more than WHOLE_BYTES that of the first bytes of each block, so that it is quick.

    Every matrix of a model that needs more lies in many blocks: other weights have another sum.
    """
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return sha256_of(path)
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as opened:
        for start in range(0, size, BLOCK_BYTES):
            digest.update(os.pread(opened.fileno(), SAMPLE_BYTES, start))
        digest.update(os.pread(opened.fileno(), SAMPLE_BYTES, size - SAMPLE_BYTES))
    return digest.hexdigest()


def _listed(names: Iterable[str], most: int = 8) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more or "no files"


# ------------------------------------------------------------------------------------------------------------ hub


def _from_hub(name: str, revision: str | None, base_seconds: float) -> BaseFiles:
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
                remedies=["unset HF_HUB_OFFLINE", *_without_hub(name, revision)],
            )
    with _explained(name, revision), _single_attempts():
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
    """The commit behind `revision`, and the files at the root of that commit."""
    from huggingface_hub import HfApi

    info = call_with_retries(
        f"asking the hub for the files of {name}",
        partial(HfApi().model_info, name, revision=revision),
        passing=_can_pass,
        remedies=_without_hub(name, revision),
        base_seconds=base_seconds,
    )
    if info.sha is None or info.siblings is None:
        raise UserError(f"The hub's answer about {name} names no commit or no files.", remedies=["check HF_ENDPOINT"])
    return info.sha, {sibling.rfilename for sibling in info.siblings if "/" not in sibling.rfilename}


def _cached(name: str, revision: str, present: Iterable[str] = ()) -> BaseFiles | None:
    """What the cache holds of `revision` if that is complete, as far as is known: `present` is the hub's list of files.

    No network, no lock.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _explained(name, revision):
        try:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    try:
        found = _inspect(name, folder, folder.name)
    except UserError as error:
        logger.info("the cache's copy of %s cannot be used as it is: %s", name, error.what)
        return None
    return found if {file for file in present if _is_small(file)} <= found.files.keys() else None


def _download(name: str, commit: str, present: set[str], base_seconds: float) -> BaseFiles:
    weight_format, entry = _entry(name, present)
    small = {file for file in present if _is_small(file)}
    if CONFIG not in small:
        raise UserError(f"{name} on the hub is no model: it has no {CONFIG}.", remedies=["check model.name"])
    with _alone(name):
        # Another process may have fetched it while this one waited.
        found = _cached(name, commit, present)
        if found is not None:
            return found
        # Weights go last: where they are complete, so is the rest, which `_cached` relies on.
        folder = _snapshot(name, commit, small | ({entry} & _INDEXES), base_seconds)
        weights = set(_weights(folder, entry))
        if not weights <= present:
            raise UserError(
                f"{name} on the hub is incomplete: {entry} names {_listed(weights - present)}, which is not there.",
                remedies=["choose another model.revision"],
            )
        logger.info("downloading %s at %s: %d %s file(s)", name, commit, len(weights), weight_format)
        _snapshot(name, commit, weights, base_seconds)
        return _inspect(name, folder, commit)


def _snapshot(name: str, commit: str, files: Iterable[str], base_seconds: float) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [glob.escape(file) for file in sorted(files)]
    fetch = partial(snapshot_download, name, revision=commit, allow_patterns=patterns)
    remedies = ["run again: the download goes on where it stopped", *_without_hub(name, commit)]
    what = f"the download of {name} from the hub"
    return Path(call_with_retries(what, fetch, passing=_can_pass, remedies=remedies, base_seconds=base_seconds))


def _remember(snapshot: Path, revision: str, commit: str) -> None:
    """Notes in the cache which commit `revision` was, as huggingface_hub does, so that it is found without the hub."""
    reference = snapshot.parents[1] / "refs" / revision
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, encoding="utf-8")
    except OSError as error:  # a cache that was made elsewhere may be read-only
        logger.info("cannot note %s in the cache: %s", revision, cause_of(error))


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """One process at a time among those that share the cache: the folds of a node do not all fetch 13 GB at once."""
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
        logger.info("the file system of %s knows no locks: processes may fetch the same file", path.parent)
    try:
        yield
    finally:
        lock.release()


# What `_single_attempts` changes is one for the whole process.
_CLIENT = threading.Lock()


class _HubError(ConnectionError):
    """A failed request to the hub, of a type that huggingface_hub neither repeats nor answers with half a snapshot."""

    def __init__(self, message: str, response: Any = None) -> None:
        super().__init__(message)
        self.response = response


@contextmanager
def _single_attempts() -> Iterator[None]:
    """Within it a request of huggingface_hub fails at once, so that `call_with_retries` alone decides (FR-011).

    By itself huggingface_hub 0.36 sends a failing HEAD or GET 6 times, takes up a stalled stream 5 times, waits for
    ever for a file list, and returns an incomplete snapshot when that list fails; the Xet transport was seen to go on
    for 219 s against a refused connection. Three attempts on top would be 18 requests, or eleven minutes.
    """
    from huggingface_hub import configure_http_backend, constants
    from huggingface_hub.utils import _http

    with _CLIENT:
        outer: Callable[[], Any] = _http._GLOBAL_BACKEND_FACTORY
        without_xet = constants.HF_HUB_DISABLE_XET

        def session() -> Any:
            made = outer()
            made.request = partial(_request_once, made.request)
            return made

        configure_http_backend(session)
        constants.HF_HUB_DISABLE_XET = True
        try:
            yield
        finally:
            configure_http_backend(outer)
            constants.HF_HUB_DISABLE_XET = without_xet


def _request_once(request: Callable[..., Any], method: str, url: str, **options: Any) -> Any:
    import requests
    from huggingface_hub import constants

    if options.get("timeout") is None:
        options["timeout"] = constants.HF_HUB_ETAG_TIMEOUT
    passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    try:
        response = request(method=method, url=url, **options)
    except passing as error:
        raise _HubError(f"no answer to {method} {url} ({_root(error)})") from error
    if response.status_code == 429 or response.status_code >= 500:
        raise _HubError(f"HTTP {response.status_code} for {method} {url}", response)
    stream = response.iter_content

    def iter_content(*args: Any, **kwargs: Any) -> Iterator[bytes]:
        try:
            yield from stream(*args, **kwargs)
        except passing as error:
            raise _HubError(f"the answer to {method} {url} broke off ({_root(error)})") from error

    response.iter_content = iter_content
    return response


def _root(error: BaseException) -> str:
    """The innermost cause, which says it best: `Connection refused` rather than four wrappers around it."""
    link = error
    while link.__cause__ or link.__context__:
        link = link.__cause__ or link.__context__ or link
    return cause_of(link)


def _can_pass(error: Exception) -> bool:
    # huggingface_hub's OSError for a file that ended early without an error on the line
    return is_passing(error) or "Consistency check failed" in str(error)


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into a UserError; what it does not know leaves unchanged."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except UserError:
        raise
    except HFValidationError as error:
        raise UserError(
            f"model.name={shown(name)} is neither a folder on this machine nor an id on the hub.",
            remedies=["give a hub id such as klyang/MentaLLaMA-chat-7B", "give the absolute path of a folder"],
        ) from error
    except OSError as error:  # requests' and huggingface_hub's errors are OSErrors as well
        raise _refusal(error, name, revision) or _disk_fault(error, name, revision) from error


def _refusal(error: OSError, name: str, revision: str | None) -> UserError | None:
    """The hub's own no, which no second attempt would change: 401, 403, 404."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it, on every node"
    url = mask_secrets(f"{constants.ENDPOINT}/{name}")
    status = status_of(error)
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{name} is gated (HTTP {status}): its owner gives access to accounts that accept its license.",
            remedies=[f"open {url} and accept the license with your account", log_in],
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{name} has no revision {revision or constants.DEFAULT_REVISION} on the hub.",
            remedies=[f"choose a branch, tag or commit from {url}/commits, or set model.revision=null"],
        )
    if status in (401, 403, 404):
        return UserError(
            f"The hub has no {name} that you may read (HTTP {status}): it does not exist, or it is private or gated.",
            remedies=[f"check the spelling of model.name: does {url} exist?", log_in],
        )
    return None


def _disk_fault(error: OSError, name: str, revision: str | None) -> UserError:
    """Whatever else kept the files from arriving: this machine's disk, or an answer that is not the hub's."""
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk is full: {name} does not fit into {cache}.",
            remedies=["free some space", "set HF_HOME to a folder on a larger disk, on every node"],
        )
    # The last two where HOME is missing, or no folder.
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return UserError(
            f"{name} cannot be written to {cache}: {error.strerror}.",
            remedies=["set HF_HOME to a folder that you may write to, on every node"],
        )
    return UserError(
        f"{name} cannot be fetched from the hub: {cause_of(error)}.",
        remedies=[
            "behind a proxy that has a certificate of its own: set REQUESTS_CA_BUNDLE to its file",
            *_without_hub(name, revision),
        ],
    )


def _near_folders(name: str) -> list[str]:
    """A hint, if `name` may be meant as a folder that is spelt otherwise."""
    path = Path(name)
    if not path.parent.is_dir() or path.parent == Path():
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
