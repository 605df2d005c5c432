"""The live view: its columns on a terminal, and the lines that it prints elsewhere."""

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from raycv.terminal.console import duration, say

COLUMNS = (
    ("fold", 4), ("state", 10), ("epoch", 7), ("step", 7), ("", 5), ("batch", 4), ("loss", 5), ("val F1", 6),
    ("best", 5), ("left", 7),
)  # fmt: skip
"""Names and minimum widths; together they fit 80 columns."""
WAITING, STARTING, LOADING, DONE, FAILED = "waiting", "starting", "loading", "done", "failed"
MILESTONES = {STARTING: "starting its processes", LOADING: "loading the model", DONE: DONE, FAILED: FAILED}
"""The states that a plain console prints, and the words for them."""


class LiveView:
    """Shows state, epoch, step, batch, loss, validation F1 and time left of every fold.

    Another thread may call `update` and `tell`. A `console` on a terminal shows a live table, any other prints lines.
    """

    def __init__(self, folds: Iterable[int], epochs: int, effective_batch: int, console: Console) -> None:
        self.epochs = epochs
        self.effective_batch = effective_batch
        self.console = console
        self._started = time.monotonic()
        self._folds: dict[int, dict[str, Any]] = {fold: {"state": WAITING} for fold in folds}
        self._printed: dict[int, tuple[str, int]] = {}
        self._live = (
            Live(console=console, refresh_per_second=4, get_renderable=self.render) if console.is_terminal else None
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
        state.update(post)
        if post.get("state") == STARTING:
            state["began"] = time.monotonic()
        if "epoch" in post and "began" in state:
            state.setdefault("stepping", time.monotonic())
        if self._live is None:
            self._print(fold, state)

    def tell(self, fold: int | None, text: str) -> None:
        """Prints an event, which stays on the screen."""
        say(self.console, f"[{self._clock()}] {'' if fold is None else f'fold {fold}: '}{text}")

    def render(self) -> Group:
        """The table as it is now."""
        table = Table(box=None, pad_edge=False)
        for name, width in COLUMNS:
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
        """Seconds until all folds are done, at the pace so far; None before the first epoch ends or if no fold runs."""
        open_folds = [state for state in self._folds.values() if state["state"] not in (DONE, FAILED)]
        running = [state for state in open_folds if state["state"] != WAITING]
        paces = [state["history"]["seconds"] for state in self._folds.values() if state.get("history")]
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
            f"{state['loss']:.3f}",
            f"{history['f1']:.3f}" if history else "",
            f"{state['best_f1']:.3f}" if "best_f1" in state else "",
            "" if state["state"] in (DONE, FAILED) else self._left(state, history),
        ]

    def _left(self, state: dict[str, Any], history: dict[str, float]) -> str:
        """Time until the last epoch ends, at the pace of the latest one. Early stopping may end the fold sooner."""
        if not history:
            return ""
        return duration(self._epochs_left(state) * history["seconds"])

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
