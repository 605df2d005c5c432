"""Prints for the commands: lines, the start of a run, the live view of its folds, the table at its end."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raycv import __version__
from raycv.common.files import read_json
from raycv.common.locations import OBJECT_STORAGE, absolute_uri, experiment_page, place_of
from raycv.common.secrets import mask_secrets
from raycv.config.process import unbroken
from raycv.config.schema import RunConfig
from raycv.data.splits import Split, positives_table
from raycv.data.types import Dataset
from raycv.errors import counted, printable
from raycv.results.run_folder import RunFolder, infer_command
from raycv.training.metrics import METRICS, THRESHOLD, collapsed_because

if TYPE_CHECKING:
    from raycv.resources.placement import Placement


LIVE_COLUMNS = (
    ("fold", 4), ("state", 10), ("epoch", 7), ("step", 7), ("", 5), ("batch", 4), ("loss", 5), ("val F1", 6),
    ("best", 5), ("left", 7),
)  # fmt: skip
"""Names and minimum widths of the live view; together they fit 80 columns."""
WAITING, STARTING, LOADING, DONE, FAILED = "waiting", "starting", "loading", "done", "failed"
ESTIMATE_STEPS, ESTIMATE_SECONDS = 5, 30.0
"""So many steps in so long a time tell how long a run takes. In a shorter epoch its first half tells."""
QUIET_SECONDS = 10.0
"""A plain console prints what the folds wait for after so long without a line, until the first step."""
NEW_LOSS = 0.1
"""The weight of a new loss in the loss that the live view shows: an exponential moving average."""
MILESTONES = {STARTING: "starting its processes", LOADING: "loading the model", DONE: DONE, FAILED: FAILED}
"""The states that a plain console prints, and the words for them."""


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints a line without markup, highlighting or line breaks, so that paths can be copied. Masks secrets."""
    text = printable(mask_secrets(text))
    if console.is_terminal:
        text = unbroken(text, console.width)
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`seconds` as `1:02:03` or `2:03`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def announce_data(console: Console, config: RunConfig, dataset: Dataset, splits: list[Split]) -> None:
    stats = dataset.stats
    say(
        console,
        f"raycv {__version__}: {config.cv.folds} folds of {config.model.name} on {len(dataset.posts):,} posts x "
        f"{len(dataset.criteria)} criteria = {len(dataset.pairs):,} pairs, {stats['positive_rate']:.1%} matched",
    )
    for warning in dataset.warnings:
        say(console, f"Warning: {warning}", "yellow")
    title = "Matched pairs per validation fold and criterion"
    table = Table(box=None)
    rows = positives_table(dataset, splits)
    criteria = list(dataset.criteria)
    for column in ("fold", "pairs", "matched", *criteria):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["fold"]), str(row["pairs"]), str(row["matched"]), *map(str, row["per_criterion"].values())
        )
    if console.measure(table).minimum > console.width:
        say(console, f"{title}: too wide for here, data_stats.json has it")
    else:
        say(console, title)
        console.print(table)


def announce_placement(
    console: Console, placement: "Placement", dashboard: str | None, cluster: str, kinds: Sequence[str]
) -> None:
    """`cluster`: what a cluster has, and what it may grow to. `kinds`: its kinds of GPU."""
    if not placement.alone:
        say(console, f"Cluster: {cluster}")
    if placement.gpus and not placement.accelerator and len(kinds) > 1:
        same = f"resources.accelerator_type={kinds[0]} gives every fold the same"
        say(console, f"Warning: the nodes have different GPUs ({', '.join(kinds)}): {same}", "yellow")
    gpus = f" and {counted(placement.gpus, 'GPU')}" if placement.gpus else ", no GPU"
    gpus += f" ({placement.accelerator})" if placement.accelerator else ""
    gpus += f", for {placement.workers} workers together" if placement.workers > 1 else ""
    where = f" Ray dashboard while it runs: http://{dashboard}" if dashboard else ""
    at_once = f"Up to {counted(placement.concurrent, 'fold')} at once, each with {counted(placement.cpus, 'CPU core')}"
    say(console, f"{at_once}{gpus}.{where}")


def announce_check(console: Console, config: RunConfig, placement: "Placement", found: Mapping[str, Any]) -> None:
    """Prints what `check=true` measured, and what the run would take."""
    for text in dict.fromkeys(found["told"]):
        say(console, text)
    say(console, f"Measured on:   {found['device']}, {found['precision']}, {found['attention']} attention")
    of = f"{found['taken'] / 1e9:.1f} of {found['limit'] / 1e9:.1f} GB"
    say(console, f"Memory:        {of} at the heaviest step")
    folds, most = len(config.cv.only or range(config.cv.folds)), config.train.epochs
    # Patience ends no fold before this epoch.
    least = min(config.train.patience + 1, most)
    for batching, pace in found["paces"].items():
        per = f"{pace.step_seconds:.2f} s a step, {pace.steps} steps an epoch, {pace.val_seconds:.1f} s a validation"
        how = f"micro-batch {pace.micro_batch}, gradient checkpointing {'on' if pace.checkpointing else 'off'}"
        say(console, f"train.batching={batching}: {per}\n               {how}")
        for epochs in dict.fromkeys((least, most)):
            takes = placement.estimate(folds, pace.seconds(epochs))
            say(console, f"               {counted(folds, 'fold')} of {counted(epochs, 'epoch')}: {takes}")
    if placement.workers > 1:
        say(console, f"One worker was measured; the {placement.workers} workers of a fold share each step.")
    say(console, "Nothing was written. Without check=true the same command starts the run.")


def verdict_lines(evaluation: Mapping[str, Any], folder: RunFolder) -> str:
    """Returns what the statistics say in short: honest F1, best floor, weakest criteria, checks, place of the page."""
    # The statistics import NumPy, which the other lines do not need.
    from raycv.rendering.blocks import estimate, label, shown

    verdict, floors = evaluation["verdict"], evaluation["floors"]
    floor = next(row["metrics"]["f1"] for row in floors["table"] if row["name"] == floors["best"])
    f1_of = {row["criterion"]: row["metrics"]["f1"]["value"] for row in evaluation["criteria"]}
    weakest = ", ".join(f"{name} {shown(f1_of[name], 'threshold')}" for name in verdict["weakest"])
    titles = {check["code"]: check["title"] for check in evaluation["checks"]}
    # A line for each check, under the first: together they would exceed the width of a terminal.
    checks = f"\n{' ' * 15}".join(f"{code} {titles[code]}" for code in verdict["checks"])
    honest, best = (shown(estimate(f1), "metric") for f1 in (verdict["f1"], floor))
    return (
        f"Honest F1:     {honest}, at thresholds tuned on other folds\n"
        f"Best floor:    {best}, {label(verdict['floor'])}\n"
        f"Weakest F1:    {weakest or 'undefined'}\n"
        f"Checks:        {checks or 'none found anything'}\n"
        f"Page:          {place_of(folder.page)}"
    )


COLUMNS = "metric_mean_f1, metric_std_f1, best_fold; of folds best_f1"
"""The columns of MLflow's table of runs that are worth opening. It shows none of them at first."""


def announce_end(
    console: Console,
    config: RunConfig,
    folder: RunFolder,
    report: dict[str, Any],
    parent_id: str,
    evaluation: Mapping[str, Any] | None = None,
) -> None:
    """Prints the table of the folds, what the statistics say (None if they failed), and where everything is."""
    console.print()
    console.print(summary_table(report))
    if evaluation is not None:
        say(console, verdict_lines(evaluation, folder))
    uri = mask_secrets(config.tracking.uri)
    look = look_into_mlflow(uri)
    page = experiment_page(uri, read_json(folder.tracking).get("experiment_id", "0"))
    say(
        console,
        f"Report:        {place_of(folder.report)}\n"
        f"Best fold:     {place_of(folder.fold(report['best_fold']).checkpoint)}\n"
        f'Ask it:        {infer_command(folder)} post="..."\n'
        f"MLflow:        {look}\n"
        f"In it:         experiment {config.tracking.experiment}, run id {parent_id}\n"
        # On a line of its own, where it fits into 80 columns.
        f"{page}\n"
        f"Columns:       {COLUMNS}\n"
        "Ray dashboard: ray start --head   keeps one up, and the next run joins it",
    )
    if lines := lines_for_afar(folder, config):
        say(console, lines)
    activate = Path(sys.executable).parent / "activate"
    if activate.is_file() and Path(shutil.which("python") or "").parent != activate.parent:
        here = activate.relative_to(Path.cwd()) if activate.is_relative_to(Path.cwd()) else activate
        say(console, f"Before you type these, once per shell: source {here}")


def lines_for_afar(folder: RunFolder, config: RunConfig) -> str | None:
    """How to have the run on the user's own machine, if it ran on another: over ssh (`ray submit`) or as a Ray job."""
    if not {"SSH_CONNECTION", "RAY_JOB_CONFIG_JSON_ENV_VAR"} & os.environ.keys():
        return None
    runs, name = place_of(folder.root.parent), folder.root.name
    if runs.startswith(OBJECT_STORAGE):
        fetch = f"python -m raycv.report run={name} dir={runs}"
        log = [] if config.tracking.uri.startswith("http") else [f"python -m raycv.aggregate run={name} dir={runs}"]
    else:
        fetch = f"ray rsync-down cluster.yaml {shlex.quote(f'{runs}/')} runs/   (or scp -r)"
        log = [] if config.tracking.uri.startswith("http") else [f"python -m raycv.aggregate run={name}"]
    log = [f"{line} tracking_uri=sqlite:///mlflow.db" for line in log]
    return "\n".join(["On your own machine, to fetch the run, and to log it there:", fetch, *log])


def look_into_mlflow(uri: str) -> str:
    """The address of a server, or the command that opens a database, from any folder of this machine."""
    uri = absolute_uri(mask_secrets(uri))
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def summary_table(report: dict[str, Any]) -> Group:
    """A row per fold of `report`, then mean and deviation if it has all folds. The title tells if it is a control."""
    control = "CONTROL, labels permuted, not a result: " if report.get("control") else ""
    missing = report.get("missing_folds", [])
    count, folds = len(report["folds"]), len(report["folds"]) + len(missing)
    part = f"{count} of {folds} folds, not the result of a " if missing else ""
    title = Text(f"{control}{report['run']}: {part}{folds}-fold cross-validation", "bold")
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("fold", "precision", "recall", "F1", "accuracy", "ROC-AUC", "threshold", "best epoch", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    collapsed = report.get("collapsed_folds", [])
    for fold in report["folds"]:
        mark = " *" if fold["fold"] == report.get("best_fold") else ""
        mark += " !" if fold["fold"] in collapsed else ""
        cells = [f"{fold['metrics'][key]:.3f}" for key in METRICS]
        cells += [f"{fold['threshold']:.2f}", f"{fold['best_epoch']}/{fold['epochs']}", f"{fold['seconds']:.0f}"]
        table.add_row(f"{fold['fold']}{mark}", *cells)
    if missing:
        said = f"Fold {', '.join(map(str, missing))} is missing, so raycv averages nothing."
    else:
        table.add_section()
        for name, row in (("mean", report["mean"]), ("std", report["std"])):
            table.add_row(name, *(f"{row[key]:.3f}" for key in METRICS), f"{row[THRESHOLD]:.2f}", "", "")
        floors = report["floors"]
        said = (
            f"* best fold by F1. std: ddof=1. Floors: F1 {floors['all_matched_f1']:.3f} (all matched), "
            f"accuracy {floors['all_unmatched_accuracy']:.3f} (all unmatched), ROC-AUC 0.5."
        )
    marked = [fold for fold in report["folds"] if fold["fold"] in collapsed]
    warnings = [f"! fold {fold['fold']}: {collapsed_because(fold.get('collapsed') or [])}" for fold in marked]
    return Group(title, table, Text(said, "dim"), *(Text(warning, "yellow") for warning in warnings))


def watched(console: Console) -> bool:
    """Whether somebody can watch a table that is drawn again and again: a log would grow by a megabyte in minutes.

    `ray submit` gives each command a terminal, even if its own output goes to a file. Such a terminal has the size 0.
    TTY_INTERACTIVE=0 turns the table off, which `cluster.yaml` sets.
    """
    try:
        has_size = os.get_terminal_size(console.file.fileno()).columns > 0
    except (OSError, ValueError):
        # The output is not a file of the system, so its maker decides.
        has_size = True
    return console.is_interactive and has_size


class LiveView:
    """Shows state, epoch, step, batch, loss, validation F1 and time left of every fold.

    Another thread may call `update` and `tell`. A `console` that is `watched` shows a live table; any other
    prints lines.
    """

    def __init__(
        self,
        folds: Iterable[int],
        epochs: int,
        effective_batch: int,
        console: Console,
        placement: "Placement | None" = None,
    ) -> None:
        """`placement`: for an estimate after the first steps; None for no estimate."""
        self.epochs = epochs
        self._to_estimate = placement
        self.effective_batch = effective_batch
        self.console = console
        self._started = self._spoke = time.monotonic()
        self._folds: dict[int, dict[str, Any]] = {fold: {"state": WAITING} for fold in folds}
        self._printed: dict[int, tuple[str, int]] = {}
        self._live = (
            Live(console=console, refresh_per_second=4, get_renderable=self.render) if watched(console) else None
        )

    def __enter__(self) -> "LiveView":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, fold: int, post: dict[str, Any]) -> None:
        """Takes news of a fold. A plain console prints `post["history"]`, the metrics of the epoch that just ended."""
        state = self._folds[fold]
        # A post of the worker may arrive after the fold ended, so we keep the final state.
        if state["state"] in (DONE, FAILED) and "state" in post:
            post = {**post, "state": state["state"]}
        place = post.get("epoch"), post.get("step")
        if "loss" in post and place != state.get("place"):
            # The losses of single steps jump. Records have them as they are.
            smooth = state.get("smooth", post["loss"])
            state |= {"place": place, "smooth": smooth + NEW_LOSS * (post["loss"] - smooth)}
            if post["epoch"] == 1:
                state.setdefault("measured", (time.monotonic(), post["step"]))
        state.update(post)
        if post.get("state") == STARTING:
            state["began"] = time.monotonic()
        if "epoch" in post and "began" in state:
            state.setdefault("stepping", time.monotonic())
        if self._to_estimate is not None and post.get("state") == "training" and "measured" in state:
            self._estimate(self._to_estimate, state)
        if self._live is None:
            self._print(fold, state)

    def _estimate(self, placement: "Placement", state: dict[str, Any]) -> None:
        """Prints how long the run takes, once, after the first steps of the fold that is the first to measure them."""
        now = time.monotonic()
        since, first = state["measured"]
        steps = state["step"] - first
        # A fold that resumes begins later, and the first steps are slow.
        enough = steps >= ESTIMATE_STEPS and now - since >= ESTIMATE_SECONDS
        if state["epoch"] > 1 or not (enough or (steps and 2 * state["step"] >= state["steps"])):
            return
        self._to_estimate = None
        fold_seconds = (now - since) / steps * state["steps"] * self.epochs
        takes = placement.estimate(len(self._folds), fold_seconds)
        self.tell(
            None, f"at the pace of the first {steps} steps the training takes {takes} at most, without validation"
        )

    def wait(self) -> None:
        """Lets a plain console print what the folds wait for, if no line came for QUIET_SECONDS and none has stepped.

        A thread calls it again and again.
        """
        began = any("epoch" in state for state in self._folds.values())
        if self._live is not None or began or time.monotonic() - self._spoke < QUIET_SECONDS:
            return
        folds_of: dict[str, list[str]] = {}
        for fold, state in self._folds.items():
            folds_of.setdefault(state["state"], []).append(str(fold))
        self.tell(None, "; ".join(f"fold {', '.join(folds)}: {state}" for state, folds in folds_of.items()))

    def tell(self, fold: int | None, text: str) -> None:
        """Prints an event, which stays on the screen."""
        self._spoke = time.monotonic()
        say(self.console, f"[{self._clock()}] {'' if fold is None else f'fold {fold}: '}{text}")

    def render(self) -> Group:
        """The table as it is now."""
        table = Table(box=None, pad_edge=False)
        for name, width in LIVE_COLUMNS:
            # Nobody can read a table that jumps with every number, so each column has a minimum width.
            table.add_column(name, justify="left" if name in ("state", "") else "right", min_width=width)
        for fold, state in self._folds.items():
            table.add_row(str(fold), *self._cells(state))
        running = sum(state["state"] not in (WAITING, DONE, FAILED) for state in self._folds.values())
        done = sum(state["state"] == DONE for state in self._folds.values())
        head = f"{done} of {len(self._folds)} folds done, {running} running, {self._clock()} since the folds started"
        left = self._all_left()
        return Group(Text(head + (f", about {duration(left)} left" if left else ""), "dim"), table)

    def _all_left(self) -> float | None:
        """Seconds until all folds are done, at the pace so far; None before the second step or if no fold runs."""
        open_folds = [state for state in self._folds.values() if state["state"] not in (DONE, FAILED)]
        running = [state for state in open_folds if state["state"] != WAITING]
        paces = [pace for state in self._folds.values() if (pace := self._epoch_seconds(state)) is not None]
        if not running or not paces:
            return None
        epoch_seconds = sum(paces) / len(paces)
        # A fold starts processes and loads the model before its first step, so we count that time too.
        starts = [state["stepping"] - state["began"] for state in self._folds.values() if "stepping" in state]
        start_seconds = sum(starts) / len(starts) if starts else 0.0
        total = 0.0
        for state in open_folds:
            begun = time.monotonic() - state["began"] if "began" in state else 0.0
            start_left = 0.0 if "stepping" in state else max(start_seconds - begun, 0.0)
            total += start_left + self._epochs_left(state) * epoch_seconds
        return total / len(running)

    def _epoch_seconds(self, state: dict[str, Any]) -> float | None:
        """Seconds of the latest epoch; in the first one at the pace of its steps so far. None before the first step."""
        if state.get("history"):
            seconds: float = state["history"]["seconds"]
            return seconds
        since, first = state.get("measured", (0.0, 0))
        steps = state.get("step", 0) - first
        return (time.monotonic() - since) / steps * state["steps"] if "measured" in state and steps else None

    def _epochs_left(self, state: dict[str, Any]) -> float:
        if "epoch" not in state:
            return self.epochs
        return max(self.epochs - state["epoch"] + 1 - state["step"] / state["steps"], 0)

    def _cells(self, state: dict[str, Any]) -> list[Any]:
        if "epoch" not in state:
            return [state["state"], *[""] * 8]
        history = state.get("history", {})
        micro = state["micro_batch"]
        return [
            state["state"],
            f"{state['epoch']}/{self.epochs}",
            f"{state['step']}/{state['steps']}",
            ProgressBar(total=state["steps"], completed=state["step"], width=5),
            f"{micro}x{-(-self.effective_batch // micro)}",
            f"{state['smooth']:.3f}",
            f"{history['f1']:.3f}" if history else "",
            f"{state['best_f1']:.3f}" if "best_f1" in state else "",
            "" if state["state"] in (DONE, FAILED) else self._left(state),
        ]

    def _left(self, state: dict[str, Any]) -> str:
        """Time until the last epoch ends, at the pace of the latest one. Early stopping may end the fold sooner."""
        seconds = self._epoch_seconds(state)
        return "" if seconds is None else duration(self._epochs_left(state) * seconds)

    def _print(self, fold: int, state: dict[str, Any]) -> None:
        """Prints the plain console's lines: each start and end, and each epoch once."""
        history = state.get("history", {})
        milestone = MILESTONES.get(state["state"], "")
        epoch = int(history.get("epoch", 0))
        last_milestone, last_epoch = self._printed.get(fold, ("", 0))
        self._printed[fold] = (milestone, epoch)
        if epoch > last_epoch:
            self.tell(
                fold,
                f"epoch {epoch}/{self.epochs}: train loss {history['train_loss']:.4f}, "
                f"val loss {history['val_loss']:.4f}, F1 {history['f1']:.3f} at threshold {history['threshold']:.2f}, "
                f"ROC-AUC {history['roc_auc']:.3f} ({history['seconds']:.0f} s)",
            )
        if milestone and milestone != last_milestone:
            self.tell(fold, milestone)

    def _clock(self) -> str:
        return duration(time.monotonic() - self._started)
