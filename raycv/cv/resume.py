"""Resumes an earlier run, and refuses if anything that its numbers depend on differs."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycv.common.environment import code_state, package_version
from raycv.common.files import sha256_of
from raycv.common.locations import WORK, place_of, runs_folder
from raycv.common.secrets import mask_secrets
from raycv.config.schema import RunConfig
from raycv.config.validation import validate
from raycv.data.splits import Split, splits_record
from raycv.data.types import Dataset
from raycv.errors import FaultsError, UserError, counted, first_of, together
from raycv.model.base_files import comparable
from raycv.results.find_run import LATEST, find_run, recorded_config, runs_in, runs_there
from raycv.results.fold_result import FoldResult
from raycv.results.run_folder import AFRESH, GOOD_COPY, RunFolder, aggregate_command, read_record, resume_command
from raycv.results.storage import resumable_copies
from raycv.tracking.lookup import recorded_uri
from raycv.utils import FIRST_NUMERICS, NUMERICS, VERSIONS

MAY_DIFFER = {
    "data.dir", "data.criteria_dir",  # their content is compared
    "train.gradient_checkpointing",  # the gradients are the same
    "cv.max_concurrent", "cv.only", "resources.gpus_per_fold", "resources.cpus_per_fold", "resources.autoscaling",
    "resources.retries", "resources.ray_logs", "resources.wait_minutes", "resources.accelerator_type",
    "tracking.uri", "tracking.artifacts", "run.dir",
}  # fmt: skip
"""Keys that a resumed run may change: they decide where and how it runs, not what it computes."""


@dataclass(frozen=True)
class Earlier:
    """The run to resume, compared with what this command asks for."""

    folder: RunFolder
    config: RunConfig
    """as it was recorded, but for what may differ"""
    faults: tuple[str, ...]
    """keys that the command line sets to another value than the run has"""

    def check(self, dataset: Dataset, splits: list[Split]) -> None:
        """Raises: FaultsError with all that differs: config, data, splits, versions."""
        inputs = [*self.data_faults(dataset), *self.split_faults(dataset, splits)]
        self._refuse([*self.faults, *self._recorded_config(), *inputs, *self._versions(), *self._numerics()])

    def check_base(self, facts: Mapping[str, Any]) -> None:
        """Raises: FaultsError if the base model is another. `facts`: what `environment.json` says of it."""
        self._refuse(self.base_faults(facts))

    def base_faults(self, facts: Mapping[str, Any]) -> list[str]:
        """Returns what differs in the base model."""
        then, now = base_of(self.folder), json.loads(json.dumps(facts))
        old, new = _base_files(then), _base_files(now)
        lines = [_then_now("base model, revision", then.get("revision"), now["revision"])]
        lines += [
            _then_now(f"base model, {file}", old.get(file), new.get(file))
            for file in comparable(sorted(old | new), old)
        ]
        return [line for line in lines if line]

    def check_attention(self, config: Any) -> None:
        """Raises: FaultsError if finished folds computed attention by a kernel that is wrong for the model.

        Earlier versions did, and recorded nothing: the other folds would be of another model. `config`: the base
        model's, of transformers. Imports torch.
        """
        from raycv.model.attention import PLAIN, choose_attention, earlier_attention

        now, _ = choose_attention(config)
        if now != PLAIN:
            # A fold finds a wrong kernel that the config does not reveal when it starts; the report then warns.
            return
        folds = self.folder.finished(self.config.cv.folds)
        results = [FoldResult.read(self.folder.fold(fold).result) for fold in folds]
        then = {result.fold: result.worker.get("attention", earlier_attention(config)) for result in results}
        self._refuse([f"attention of fold {fold}: {was} then, {now} now" for fold, was in then.items() if was != now])

    def check_prompts(self, facts: Mapping[str, Any]) -> None:
        """Raises: FaultsError if the prompts are others. `facts`: what `data_stats.json` says of them.

        Earlier versions read a post that spells `</s>` as that token.
        """
        key = "posts_spelling_special_tokens"
        if facts[key] and key not in read_record(self.folder.data_stats, encoding=dict)["encoding"]:
            self._refuse([f"{counted(facts[key], 'post')} with special tokens: tokens then, text now"])

    def check_states(self) -> None:
        """Raises: UserError if an unfinished fold has a state that cannot be continued here. Imports torch."""
        from raycv.training.state import StateFolder

        finished, faults = self.folder.finished(self.config.cv.folds), []
        for fold in set(range(self.config.cv.folds)) - set(finished):
            try:
                StateFolder(self.folder.fold(fold).state).check()
            except UserError as error:
                faults.append(error)
        if faults:
            raise together(faults)

    def warnings(self) -> list[str]:
        """Differences that do not prevent a resume: raycv's version and git commit. Most commits change no number."""
        recorded = read_record(self.folder.environment, packages=dict, git=dict | None)
        commits = (_commit(state) for state in (recorded["git"], code_state()))
        lines = [
            _then_now("raycv's version", recorded["packages"].get("raycv"), package_version("raycv")),
            _then_now("the code's git commit", *commits),
        ]
        return [f"{line}: resumed folds may differ if the change touches what is computed" for line in lines if line]

    def _refuse(self, faults: list[str]) -> None:
        if faults:
            raise FaultsError(
                f"Run {self.folder.root.name} cannot be resumed, since something differs from its record",
                faults,
                kind="resume-differs",
                remedies=[f"put it back, then resume: {resume_command(self.folder)}", f"or {AFRESH}"],
            )

    def _numerics(self) -> list[str]:
        """Reports a run, or a finished fold, whose arithmetic (`NUMERICS`) is not the one that raycv has now."""
        environment = read_record(self.folder.environment, packages=dict, git=dict | None)
        numbers = {environment.get("numerics", FIRST_NUMERICS)}
        for fold in self.folder.finished(self.config.cv.folds):
            # One whose result is damaged is trained again.
            with suppress(UserError):
                numbers.add(FoldResult.read(self.folder.fold(fold).result).numerics)
        then = " and ".join(sorted(map(str, numbers)))
        line = _then_now("the number of raycv's arithmetic", then, str(NUMERICS))
        began = f"raycv {environment['packages'].get('raycv')}, commit {_commit(environment['git'])}"
        return [f"{line}; the run began with {began}: resume it with that, or start afresh"] if line else []

    def _recorded_config(self) -> list[str]:
        # Earlier versions recorded no hash of it.
        then, now = read_record(self.folder.environment).get("config_sha256"), sha256_of(self.folder.config)
        line = _then_now("config.yaml was changed, its sha256", then, now)
        return [f"{line}; MLflow's parent run has the one that was recorded"] if then is not None and line else []

    def data_faults(self, dataset: Dataset) -> list[str]:
        """Returns what differs in the counts and hashes of the data."""
        stats = read_record(self.folder.data_stats)
        keys = {"posts": "posts", "pairs": "pairs", "positives": "matched pairs", "criteria": "criteria"}
        keys |= {"data_hash": "hash of posts and labels", "criteria_hash": "hash of the criteria"}
        lines = [_then_now(f"data, {name}", stats.get(key), dataset.stats[key]) for key, name in keys.items()]
        return [line for line in lines if line]

    def split_faults(self, dataset: Dataset, splits: list[Split]) -> list[str]:
        """Returns what differs in the folds."""
        then, now = read_record(self.folder.splits, folds=list), splits_record(dataset, splits, self.config.cv.seed)
        if then == now:
            return []
        if then.get("rows") != now["rows"]:
            return ["splits: splits.json is of other pairs"]
        others = [fold["fold"] for fold in now["folds"] if fold not in then["folds"]]
        return [f"splits: {counted(len(others), 'fold')} of {len(splits)} hold other pairs than in splits.json"]

    def _versions(self) -> list[str]:
        then = read_record(self.folder.environment, packages=dict)["packages"]
        lines = [_then_now(name, then.get(name), package_version(name)) for name in VERSIONS]
        return [line for line in lines if line]


def earlier_run(config: RunConfig, typed: Collection[str]) -> Earlier:
    """The run that `config.resume` names, in `config.run.dir`; `typed`: the keys that the command line sets.

    Raises: UserError if there is no such run, or if it is finished.
    """
    assert config.resume is not None
    folder = _find(runs_folder(config.run.dir, WORK), config.resume)
    values, given, faults = recorded_config(folder).model_dump(), config.model_dump(), []
    # A branch, or null, may mean another commit by now: the recorded commit counts.
    commit = base_of(folder).get("revision")
    if commit is not None and given["model"]["revision"] in (commit, values["model"]["revision"]):
        given["model"]["revision"] = commit
    values["model"]["revision"] = commit
    # It holds for one command, so that a resumed run trains all that is missing.
    values["cv"]["only"] = None
    for section, name in sorted(key.split(".") for key in typed if "." in key):
        recorded, asked = values[section][name], given[section][name]
        if f"{section}.{name}" in MAY_DIFFER:
            values[section][name] = asked
        elif asked != recorded:
            faults.append(f"{section}.{name}: the run has {_shown(recorded)}, the command line {_shown(asked)}")
    values["tracking"]["uri"] = _tracking_uri(folder, config, typed)
    values["run"]["dir"] = place_of(folder.root.parent)
    resumed = validate(RunConfig, values)
    check_only(resumed)
    return Earlier(folder, resumed, tuple(faults))


def check_only(config: RunConfig) -> None:
    """Raises: UserError if `cv.only` names a fold that the run does not have."""
    if beyond := [fold for fold in config.cv.only or () if fold >= config.cv.folds]:
        raise UserError(
            f"cv.only={config.cv.only}: the run has no fold {first_of(list(map(str, beyond)), 5)}.",
            kind="config-value",
            remedies=[f"name folds from 0 to {config.cv.folds - 1}, as cv.folds is {config.cv.folds}"],
        )


@contextmanager
def sole_process(folder: RunFolder) -> Iterator[None]:
    """Holds the run while the block runs. Raises: UserError if another process has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.lock, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Run {folder.root.name} is under way: another process holds {folder.lock}.",
            kind="run-busy",
            remedies=["wait until it ends, or stop it (Ctrl-C); then resume: " + resume_command(folder)],
        ) from None
    except OSError as error:
        raise UserError(
            f"Run {folder.root.name} cannot be resumed: raycv cannot write to {folder.root} ({error.strerror}).",
            kind="disk-unwritable",
            remedies=["make the folder writable for you"],
        ) from error
    try:
        # Another process may have finished the run in the meantime.
        _refuse_finished(folder)
        yield
    finally:
        if folder.report.is_file():
            # Nobody may resume a complete run.
            folder.lock.unlink(missing_ok=True)
            folder.share.unlink(missing_ok=True)
        lock.release()


def base_of(folder: RunFolder) -> dict[str, Any]:
    """Reads what the run recorded of its base model. Raises: UserError if the record is damaged."""
    return dict(read_record(folder.environment, base_model=dict)["base_model"])


def _find(runs: Path, which: str) -> RunFolder:
    resumable_copies(runs, None if which == LATEST else which)
    if which != LATEST:
        folder = find_run(runs, which)
        if folder is None and (fold := next((runs / which).glob("fold_*"), None)) is not None:
            config_file = fold.parent.absolute() / "config.yaml"
            raise UserError(
                f"resume={which}: {config_file} is missing, which says what the run is.",
                kind="run-damaged",
                remedies=[GOOD_COPY],
            )
        if folder is None:
            what = f"resume={which}: {place_of(runs.absolute())} holds no such run."
            raise UserError(what, kind="run-missing", remedies=runs_there(runs, which, "run.dir"))
        _refuse_finished(folder)
        if not folder.has_begun():
            what = f"resume={which}: the run ended before its first fold, so it has nothing to resume."
            raise UserError(
                what, kind="run-missing", remedies=[f"remove it, and its name is free: rm -r {folder.root}", AFRESH]
            )
        return folder
    folders = runs_in(runs)
    # A reproduction of some folds is complete without a report.
    begun = [folder for folder in folders if folder.has_begun() and not folder.reproduction.is_file()]
    unfinished = [folder for folder in begun if not folder.report.is_file()]
    if not unfinished:
        place = place_of(runs.absolute())
        complete = counted(sum(folder.report.is_file() for folder in folders), "run")
        # Finished runs of an object storage have no local copies here.
        there = f" ({complete} there finished)" if place == str(runs.absolute()) else ""
        raise UserError(
            f"resume=latest: {place} holds no unfinished run{there}.",
            kind="run-missing",
            remedies=["name the folder that holds it: run.dir=<folder>", "start one: python -m raycv.run"],
        )
    return unfinished[-1]


def _refuse_finished(folder: RunFolder) -> None:
    if folder.report.is_file():
        raise UserError(
            f"resume={folder.root.name}: the run is finished, its report is {folder.report}.",
            kind="run-exists",
            remedies=[f"the summary again, and into MLflow if it lacks it: {aggregate_command(folder)}", AFRESH],
        )


def _tracking_uri(folder: RunFolder, config: RunConfig, typed: Collection[str]) -> str:
    """Finds the run's MLflow store. The record has no password, so the address on the command line may add it."""
    given = config.tracking.uri
    if "tracking.uri" in typed:
        return given
    recorded = recorded_uri(folder, "tracking.uri")
    return given if mask_secrets(given) == recorded else recorded


def _then_now(what: str, then: Any, now: Any) -> str | None:
    return None if then == now else f"{what}: {_shown(then)} then, {_shown(now)} now"


def _base_files(facts: Mapping[str, Any]) -> dict[str, str]:
    """Size and checksum of each file of a base model."""
    files, sums = facts.get("files"), facts.get("sha256")
    if not isinstance(files, dict) or not isinstance(sums, dict):
        return {}
    return {file: f"{size} bytes, SHA-256 {sums.get(file)}" for file, size in files.items()}


def _commit(state: Mapping[str, Any] | None) -> str:
    if state is None:
        return "unknown"
    return str(state.get("commit"))[:12] + (" with changes" if state.get("dirty") else "")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
