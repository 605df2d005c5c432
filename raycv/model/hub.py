"""The hub's client as raycv uses it: one attempt a request, and its errors as words that help (FR-011)."""

import difflib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from raycv.common.files import is_full, unwritable
from raycv.common.retry import cause_of, is_passing, status_of
from raycv.common.secrets import mask_secrets
from raycv.errors import UserError, shown


class _HubError(ConnectionError):
    """A failed request. huggingface_hub neither repeats it nor returns an incomplete snapshot for it."""

    def __init__(self, message: str, response: Any = None) -> None:
        super().__init__(message)
        self.response = response


@cache
def single_attempts() -> None:
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


def can_pass(error: Exception) -> bool:
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
    except ValueError as error:
        # A token that no header can hold, or a switch that asks for a package which is not installed.
        switches = ", ".join(sorted(key for key in os.environ if key.startswith(("HF_", "HUGGING"))))
        raise UserError(
            f"{name} cannot be fetched from the hub with the settings of its client: {cause_of(error)}.",
            kind="hub-unreachable",
            remedies=[f"correct or unset the variable that this is about (set here: {switches or 'none'})"],
        ) from error


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
            if may_be_folder(name)
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
            *without_hub(name, revision),
        ],
    )


def may_be_folder(name: str) -> bool:
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


def without_hub(name: str, revision: str | None) -> list[str]:
    from huggingface_hub import constants

    at = f" --revision {revision}" if revision not in (None, constants.DEFAULT_REVISION) else ""
    return [
        *_near_folders(name),
        "check the network of this node, and HTTPS_PROXY if there is a proxy",
        f"set HF_ENDPOINT to a mirror (now {mask_secrets(constants.ENDPOINT)})",
        f"download it beforehand where there is a network: `hf download {name}{at}`, then copy HF_HOME over",
        "set model.name to the absolute path of a folder that holds the model",
    ]
