"""Trains folds of a run again under its recorded config, and tells whether they came to the same."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from raycv.analysis.reproduction import DIFFERENT, INPUTS, TOLERANCE, compare_folds, finished_result, reproduction_table
from raycv.common.files import write_json
from raycv.common.locations import place_of, runs_folder
from raycv.config.schema import ReproduceConfig, RunConfig
from raycv.config.validation import validate
from raycv.cv.new_run import NewRun
from raycv.cv.open_run import OpenRun
from raycv.cv.pipeline import run_to_its_end
from raycv.cv.preparation import Base
from raycv.cv.resume import Earlier, base_of
from raycv.data.splits import Split
from raycv.data.types import Dataset
from raycv.errors import FaultsError, NotShownError, UserError
from raycv.orchestration.fold_task import Prepared
from raycv.rendering.terminal import say
from raycv.results.find_run import existing_run, recorded_config, said_latest
from raycv.results.run_folder import RunFolder
from raycv.results.storage import publish_records
from raycv.tracking.lookup import check_password, recorded_uri, tracked_run


def reproduce(config: ReproduceConfig) -> None:
    """Trains the folds again in a new run folder, compares them, writes `reproduction.json` there and prints a table.

    Raises:
        UserError: No such run, a fold of it is not finished, or data, folds or base model are not those of the run.
        RunFailedError: A fold failed.
        NotShownError: The folds came to something else.
    """
    console = Console()
    original = _found(config.run, runs_folder(config.dir), console)
    for fold in config.folds:
        finished_result(original, fold)
    if config.trained is not None:
        again = _found(config.trained, runs_folder(config.dir), console)
    else:
        again = _trained_again(original, config, console)
    found = compare_folds(original, again, config.folds)
    if config.trained is not None:
        _check_is_reproduction(original, again, found)
    write_json(again.reproduction, found)
    publish_records(again)
    console.print(reproduction_table(found))
    say(console, f"Written: {place_of(again.reproduction)}")
    if config.trained is None:
        _log(again, found, console)
    if found["result"] == DIFFERENT:
        bad = ", ".join(str(row["fold"]) for row in found["folds"] if row["result"] == DIFFERENT)
        what = f"Run {original.root.name} was not reproduced: the F1 of fold {bad} moved by {TOLERANCE} or more."
        raise NotShownError(what, kind="not-reproduced")


def _check_is_reproduction(original: RunFolder, again: RunFolder, found: Mapping[str, Any]) -> None:
    """Raises: UserError if `again` is the original itself, or trained on other data or with other settings."""
    changed = [f"{one['name']}: {one['then']}, {one['now']}" for one in found["differences"] if one["kind"] in INPUTS]
    if again.root.resolve() == original.root.resolve():
        changed = ["it is the run itself"]
    if changed:
        raise FaultsError(
            f"Run {again.root.name} does not reproduce {original.root.name}",
            changed,
            kind="runs-differ",
            remedies=[f"leave out trained=, and raycv trains the folds: run={original.root.name}"],
        )


def _found(name: str, runs: Path, console: Console) -> RunFolder:
    folder = existing_run(runs, name)
    if line := said_latest(name, folder):
        say(console, line)
    return folder


class Reproduction(NewRun):
    """A new run of folds that another run trained, on the same data, folds and base model."""

    wants_all_folds = False

    def __init__(self, config: RunConfig, original: RunFolder, console: Console, held: contextlib.ExitStack) -> None:
        super().__init__(config, console, held)
        self._original = original
        self._earlier = Earlier(original, config, ())

    def check_data(self, dataset: Dataset, splits: list[Split]) -> None:
        """Raises: UserError if data or folds are not those of the run, or raycv cannot make the new run's folder."""
        self._refuse([*self._earlier.data_faults(dataset), *self._earlier.split_faults(dataset, splits)])
        super().check_data(dataset, splits)

    def check_base(self, base: Base) -> None:
        """Raises: UserError if the base model is another, or raycv cannot use the MLflow store."""
        self._refuse(self._earlier.base_faults(base.facts))
        super().check_base(base)

    def open(self, prepared: Prepared) -> OpenRun:
        """Makes the run's folder and its MLflow parent, whose tag names the original."""
        opened = super().open(prepared)
        with contextlib.suppress(UserError):
            opened.store.set_tags(opened.parent_id, {"raycv.reproduces": self._original.root.name})
        return opened

    def _refuse(self, faults: list[str]) -> None:
        if faults:
            raise FaultsError(
                f"Run {self._original.root.name} cannot be reproduced, since its input differs from the record",
                faults,
                kind="resume-differs",
                remedies=["give the data of the run: data.dir=<folder>", "give its base model: base=<folder>"],
            )


def _trained_again(original: RunFolder, config: ReproduceConfig, console: Console) -> RunFolder:
    planned = _planned(original, config)
    with contextlib.ExitStack() as held:
        run_to_its_end(Reproduction(planned, original, console, held), console)
    assert planned.run.name is not None
    # A run in an object storage was published, and is fetched.
    return existing_run(original.root.parent, planned.run.name)


def _planned(original: RunFolder, config: ReproduceConfig) -> RunConfig:
    """The recorded config with the folds to train, in a free folder beside the original."""
    recorded = recorded_config(original)
    values = recorded.model_dump()
    names = (f"{original.root.name[:80]}-reproduced{number}" for number in ("", *map("-{}".format, range(2, 1000))))
    values["run"] = {
        "name": next(name for name in names if not (original.root.parent / name).exists()),
        "dir": place_of(original.root.parent),
    }
    values["cv"]["only"] = sorted(config.folds)
    # A branch, or null, may mean another commit by now: the recorded commit counts.
    values["model"]["revision"] = base_of(original).get("revision")
    if config.base is not None:
        values["model"] |= {"name": config.base, "revision": None}
    if config.data.dir is not None:
        # Criteria that lay beside the posts move along with them.
        beside = recorded.data.criteria_dir == recorded.data.dir
        values["data"] |= {"dir": config.data.dir} | ({"criteria_dir": config.data.dir} if beside else {})
    if config.data.criteria_dir is not None:
        values["data"]["criteria_dir"] = config.data.criteria_dir
    given = config.resources.model_dump()
    values["resources"] |= {key: value for key, value in given.items() if value is not None}
    values["tracking"]["uri"] = config.tracking_uri or recorded_uri(original, "tracking_uri")
    check_password(values["tracking"]["uri"])
    return validate(RunConfig, values, recorded=True)


def _log(again: RunFolder, found: Mapping[str, Any], console: Console) -> None:
    """Logs the result to the new run's MLflow parent, which is then finished. A refusal of MLflow only warns."""
    try:
        store, parent_id = tracked_run(again, recorded_uri(again, "tracking_uri"), "tracking_uri", given=False)
        store.set_tags(parent_id, {"raycv.reproduced": found["result"]})
        store.log_files(parent_id, [again.reproduction])
        store.finish(parent_id, "FINISHED")
    except UserError as error:
        say(console, f"Warning: the result is not in MLflow: {error.what}", "yellow")
