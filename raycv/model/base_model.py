"""Finds the files of a base model by its name: a folder, `raycv://...`, or an id on the hub (FR-001, FR-011)."""

import os
from pathlib import Path

from raycv.common.locations import resolve
from raycv.common.retry import BASE_SECONDS
from raycv.errors import UserError
from raycv.model.base_files import BaseFiles, inspect_folder
from raycv.model.hub import explained_hub_errors, fetch_from_hub


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
        return fetch_from_hub(name, revision, base_seconds)
    if revision is not None:
        raise UserError(
            f"model.revision={revision} means nothing for model.name={name}, which is a folder.",
            kind="config-value",
            remedies=["set model.revision=null"],
        )
    return inspect_folder(name, Path(os.path.expanduser(location)).absolute(), None)


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
