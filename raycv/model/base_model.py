"""The base model's name to its files: a folder, raycv://..., or the hub (FR-001, FR-011)."""

import os
from pathlib import Path

from raycv.common.locations import resolve
from raycv.common.retry import BASE_SECONDS
from raycv.errors import UserError
from raycv.model.base_files import BaseFiles, inspect_folder
from raycv.model.hub import explained_hub_errors, fetch_from_hub

# ---------------------------------------------------------------------------------------------------------- files


def fetch_base(name: str, revision: str | None, *, base_seconds: float = BASE_SECONDS) -> BaseFiles:
    """The files of base model `name`, downloaded if need be; several processes may call it at once (FR-001, FR-011).

    `name` is a hub id, a folder, or raycv://...; `revision` a branch, tag or commit of the hub, None for main.
    A commit that the cache holds costs no network. `base_seconds` is the wait before the second attempt.

    Raises: UserError if the files cannot be had or are no model, with the cause and what to do.
    """
    location = resolve(name)
    if not is_folder(location):
        return fetch_from_hub(name, revision, base_seconds)
    if revision is not None:
        raise UserError(
            f"model.revision={revision} means nothing for model.name={name}, which is a folder.",
            remedies=["set model.revision=null"],
        )
    return inspect_folder(name, Path(os.path.expanduser(location)).absolute(), None)


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

    with explained_hub_errors(name, revision):
        validate_repo_id(name)


def absolute_name(name: str) -> str:
    """`name` with a relative folder made absolute, all else unchanged: for the driver, as workers run elsewhere."""
    return str(Path(os.path.expanduser(name)).absolute()) if is_folder(name) else name


def is_folder(name: str) -> bool:
    """Whether `name` means a folder, not an id on the hub."""
    path = Path(os.path.expanduser(name))
    return path.is_absolute() or name.startswith(".") or os.path.isdir(path)
