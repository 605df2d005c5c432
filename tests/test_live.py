"""The live view: plain lines that say each thing once, and a table that fits a terminal."""

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
from ray.tune import TuneError
from rich.console import Console
from support.refusals import refuses

from raycv.errors import RunFailedError
from raycv.orchestration.cluster import explained_loss
from raycv.rendering.terminal import DONE, FAILED, STARTING, LiveView, duration, look_into_mlflow, say, watched
from raycv.resources.placement import Placement
from raycv.results.run_folder import FoldFolder, RunFolder

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def history(epoch: int, **values: float) -> dict[str, float]:
    usual = {"train_loss": 0.7, "val_loss": 0.6, "f1": 0.4, "threshold": 0.35, "roc_auc": 0.8, "seconds": 60.0}
    return {"epoch": epoch, **usual, **values}


def step(epoch: int, step: int = 5, steps: int = 10, state: str = "training") -> dict[str, Any]:
    return {"state": state, "epoch": epoch, "step": step, "steps": steps, "loss": 0.5, "micro_batch": 4}


class Plain:
    """A view on a console that is no terminal, such as a log file."""

    def __init__(self, folds: int = 2, epochs: int = 3, width: int = 80) -> None:
        self.file = io.StringIO()
        self.view = LiveView(range(folds), epochs, 32, Console(file=self.file, width=width))

    def lines(self) -> list[str]:
        """Without the clock in front."""
        return [re.sub(r"^\[\d+:\d\d\] ", "", line) for line in self.file.getvalue().splitlines()]


# --- Plain lines -----------------------------------------------------------------------------------------------------


def test_a_fold_from_start_to_end_says_each_thing_once() -> None:
    plain = Plain()
    with plain.view as view:
        view.update(0, {"state": STARTING})
        view.update(0, {"state": STARTING})
        view.update(0, {"state": "loading"})
        board: dict[str, Any] = {}
        for epoch in (1, 2, 3):
            board |= step(epoch)
            view.update(0, dict(board))
            board |= step(epoch, 10, state="validating")
            view.update(0, dict(board))
            board |= {"history": history(epoch, f1=epoch / 10), "best_f1": epoch / 10}
            for _ in range(3):  # the board is read four times a second, whether there is news or not
                view.update(0, dict(board))
        view.update(0, {"state": DONE})
        view.update(0, dict(board))
        view.update(0, {"state": DONE})

    lines = plain.lines()
    assert lines[0] == "fold 0: starting its processes"
    assert lines[-1] == "fold 0: done"
    assert lines[1] == "fold 0: loading the model"
    assert lines[2] == (
        "fold 0: epoch 1/3: train loss 0.7000, val loss 0.6000, F1 0.100 at threshold 0.35, ROC-AUC 0.800 (60 s)"
    )
    assert [line.split(":")[1] for line in lines[2:-1]] == [" epoch 1/3", " epoch 2/3", " epoch 3/3"]
    assert len(lines) == 6


@pytest.mark.parametrize("end", [DONE, FAILED])
def test_late_post_does_not_reopen_a_finished_fold(end: str) -> None:
    plain = Plain()
    view = plain.view
    view.update(0, {"state": STARTING})
    view.update(0, step(1) | {"history": history(1)})
    view.update(0, {"state": end})
    view.update(0, step(2, state="validating") | {"history": history(2)})
    view.update(0, {"state": STARTING})

    assert plain.lines().count(f"fold 0: {end}") == 1
    assert plain.lines().count("fold 0: starting its processes") == 1
    # The last epoch's numbers may come after the end; they are not lost.
    assert sum("epoch 2/3" in line for line in plain.lines()) == 1
    assert re.match(rf" *0 +{end} ", rows(view)[2])


def test_folds_do_not_mix() -> None:
    plain = Plain(folds=3)
    for fold in (0, 1):
        plain.view.update(fold, {"state": STARTING})
        plain.view.update(fold, {"history": history(1)})
    plain.view.update(1, {"state": FAILED})
    assert [line[:14] for line in plain.lines()] == [
        "fold 0: starti",
        "fold 0: epoch ",
        "fold 1: starti",
        "fold 1: epoch ",
        "fold 1: failed",
    ]


def test_fold_that_ends_without_an_epoch() -> None:
    plain = Plain()
    plain.view.update(1, {"state": STARTING})
    plain.view.update(1, {"state": FAILED})
    assert plain.lines() == ["fold 1: starting its processes", "fold 1: failed"]


def test_long_lines_are_not_wrapped_and_nothing_is_markup() -> None:
    plain = Plain(width=40)
    text = "[bold]no markup[/bold] /very" + "/long" * 60 + " [0:00]"
    plain.view.tell(1, text)
    plain.view.tell(None, "without a fold")
    plain.view.update(0, {"history": history(1)})
    lines = plain.lines()
    assert lines[:2] == [f"fold 1: {text}", "without a fold"]
    assert len(lines) == 3
    assert "\x1b" not in plain.file.getvalue()


def test_every_line_begins_with_the_clock() -> None:
    plain = Plain()
    plain.view.tell(0, "x")
    assert re.fullmatch(r"\[0:0\d\] fold 0: x\n", plain.file.getvalue())


@pytest.mark.parametrize(
    "text", ["/tmp/[run]/" + "x" * 200, "[red]3.5[/red]", "a:cat:b"], ids=["path", "markup", "emoji"]
)
def test_say_leaves_a_text_as_it_is(text: str) -> None:
    file = io.StringIO()
    say(Console(file=file, width=20), text, "yellow")
    assert file.getvalue() == f"{text}\n"


# --- The terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def screen() -> tuple[LiveView, io.StringIO]:
    file = io.StringIO()
    console = Console(force_terminal=True, width=100, height=30, file=file, color_system=None)
    return LiveView(range(5), 100, 32, console), file


def rows(view: LiveView, width: int = 100) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(view.render())
    return file.getvalue().splitlines()


def test_terminal_shows_state_progress_and_time_left(screen: tuple[LiveView, io.StringIO]) -> None:
    view, file = screen
    with view:
        view.update(0, {"state": STARTING})
        view.update(1, step(100, 418, 418, "validating") | {"history": history(99, f1=0.456), "best_f1": 0.5})
        view.update(2, {"state": FAILED})
        view.update(3, step(1))
        view.tell(1, "out of memory: micro-batch 4 from now on " + "x" * 120)
        table = rows(view)
    shown = ANSI.sub("", file.getvalue())

    assert "fold  state" in shown
    assert "validating" in shown
    # Wide or not, an event is one line of text, which the terminal may fold but can be copied whole.
    assert "fold 1: out of memory: micro-batch 4 from now on " + "x" * 120 in re.sub(" +", " ", shown)
    assert "epoch 99/100" not in shown  # the table shows it
    assert table[0].startswith("0 of 5 folds done, 3 running")
    assert re.search(r"^ *0 +starting$", table[2].rstrip())
    assert re.search(r"1 +validating +100/100 +418/418 +\S+ +4x8 +0\.500 +0\.456 +0\.500 +0:00", table[3])
    assert re.search(r"2 +failed$", table[4].rstrip())
    assert re.search(r"3 +training +1/100 +5/10 +\S+ +4x8 +0\.500$", table[5].rstrip())
    assert re.search(r"4 +waiting$", table[6].rstrip())


@pytest.mark.parametrize("width", [80, 100])
def test_table_is_not_truncated(width: int) -> None:
    """The widest that MentaLLaMA on ReDSM5 gives: 100 epochs of 334 steps, some hours each."""
    view = LiveView(range(5), 100, 32, Console(file=io.StringIO()))
    for fold in range(5):
        post = step(10, 334, 334, "validating") | {"history": history(9, seconds=3999), "best_f1": 1.0}
        view.update(fold, post | {"epoch": 10, "micro_batch": 8, "loss": 1.25})
    head, *table = rows(view, width)
    assert "about 99:58:30 left" in head
    text = "\n".join(table)
    assert "…" not in text
    assert len(table) == 6
    for part in ("334/334", "10/100", "8x4", "1.250", "0.400", "1.000", "99:58:30", "validating"):
        assert text.count(part) == 5
    for name in ("fold", "state", "epoch", "step", "batch", "loss", "val F1", "best"):
        assert name in text


def test_time_left_goes_by_the_pace_of_the_last_epoch() -> None:
    view = LiveView(range(1), 10, 32, Console(file=io.StringIO()))
    view.update(0, step(3, 5, 10))
    assert rows(view)[2].rstrip().endswith("0.500")  # no epoch has ended: nothing to go by
    view.update(0, {"history": history(2, seconds=60)})
    assert rows(view)[2].rstrip().endswith(" 7:30")  # half of epoch 3 and 7 more
    view.update(0, step(10, 10, 10) | {"history": history(10, seconds=60)})
    assert rows(view)[2].rstrip().endswith(" 0:00")
    view.update(0, {"state": DONE})
    assert not rows(view)[2].rstrip().endswith("0:00")
    assert rows(view)[0].startswith("1 of 1 folds done, 0 running")


def test_uneven_micro_batch_shows_the_steps_that_it_takes() -> None:
    view = LiveView(range(1), 10, 32, Console(file=io.StringIO()))
    view.update(0, step(1) | {"micro_batch": 12})
    assert " 12x3 " in rows(view)[2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.99, "0:09"), (60, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_first_steps_tell_once_how_long_the_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("raycv.rendering.terminal.time.monotonic", lambda: now)
    file = io.StringIO()
    placement = Placement(gpus=1, cpus=1, workers=1, concurrent=2, at_most=2)
    view = LiveView(range(4), 10, 32, Console(file=file), placement)
    for steps in range(1, 9):
        for fold in range(2):
            view.update(fold, step(1, steps, 360))
        now += 10
    said = [line for line in file.getvalue().splitlines() if "pace" in line]
    # 360 steps of 10 s in each of 10 epochs are 10 hours a fold.
    assert len(said) == 1
    assert said[0].endswith(
        "at the pace of the first 5 steps the training takes about 20.0 hours, 40.0 GPU-hours at most, "
        "without validation"
    )


def test_a_short_epoch_tells_after_its_half_and_the_table_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("raycv.rendering.terminal.time.monotonic", lambda: now)
    file = io.StringIO()
    view = LiveView(range(2), 3, 32, Console(file=file), Placement(0, 1, 1, 2, 2))
    for steps in (1, 3, 5):
        view.update(0, step(1, steps, 10))
        now += 4
    assert "at the pace of the first 4 steps the training takes about 1 minute at most" in file.getvalue()
    # 12 s for 4 steps: 30 s an epoch, of which two and a half are left; the other fold has none of its own yet.
    table = rows(view)
    assert table[2].rstrip().endswith(" 1:15")
    assert "about " in table[0]
    assert "train loss" not in file.getvalue()


def test_a_plain_console_tells_every_ten_seconds_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("raycv.rendering.terminal.time.monotonic", lambda: now)
    file = io.StringIO()
    view = LiveView(range(3), 3, 32, Console(file=file))
    view.update(0, {"state": STARTING})
    for _ in range(100):
        now += 0.25
        view.wait()
    waited = [line for line in file.getvalue().splitlines() if "waiting" in line]
    assert waited == ["[0:10] fold 0: starting; fold 1, 2: waiting", "[0:20] fold 0: starting; fold 1, 2: waiting"]
    view.update(0, step(1))
    now += 60
    view.wait()
    assert file.getvalue().count("waiting") == 2


def test_the_loss_that_is_shown_is_smoothed_and_each_step_counts_once() -> None:
    view = LiveView(range(1), 3, 32, Console(file=io.StringIO()))
    for _ in range(3):
        view.update(0, step(1, 1, 10) | {"loss": 1.0})
    for _ in range(3):
        view.update(0, step(1, 2, 10) | {"loss": 2.0})
    assert " 1.100" in rows(view)[2]


@pytest.mark.parametrize("width", [60, 80, 81])
def test_a_terminal_breaks_no_word_and_the_line_can_be_copied_whole(width: int) -> None:
    path = "'/data/two words/runs'"
    line = (
        f"Run folder: /tmp/somewhere/else/runs/x   (if it is interrupted: python -m raycv.run resume=x run.dir={path})"
    )
    file = io.StringIO()
    say(Console(file=file, width=width, force_terminal=True), line)
    shown = ANSI.sub("", file.getvalue()).removesuffix("\n")
    assert "\n" not in shown
    edges = range(width, len(shown), width)
    assert all(" " in shown[edge - 1 : edge + 1] for edge in edges)
    assert path in shown
    assert shown.split() == line.split()
    assert all(not (start < edge < start + len(path)) for start in [shown.index(path)] for edge in edges)
    assert shlex.split(shown.replace("(", "").replace(")", "")) == shlex.split(line.replace("(", "").replace(")", ""))


def test_a_fold_that_resumes_gives_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("raycv.rendering.terminal.time.monotonic", lambda: now)
    file = io.StringIO()
    view = LiveView(range(1), 10, 32, Console(file=file), Placement(1, 1, 1, 1, 1))
    for steps in range(1, 9):
        view.update(0, step(2, steps, 360))
        now += 10
    assert "pace" not in file.getvalue()


# --- What watches the table ------------------------------------------------------------------------------------------


def terminal(columns: int, **environment: str) -> bool:
    """Whether a terminal of so many columns is watched."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24 * bool(columns), columns, 0, 0))
    with os.fdopen(slave, "w") as file:
        answer = watched(Console(file=file, _environ={"TERM": "xterm", **environment}))
    os.close(master)
    return answer


def test_a_terminal_is_watched() -> None:
    assert terminal(80)


def test_a_terminal_without_a_size_is_not_watched() -> None:
    """That of a command over ssh, from a process without one."""
    assert not terminal(0)


def test_the_table_can_be_turned_off() -> None:
    assert not terminal(80, TTY_INTERACTIVE="0")
    assert not terminal(80, TERM="dumb")


def test_a_file_is_not_watched(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        assert not watched(Console(file=file))


# --- The command that opens MLflow -----------------------------------------------------------------------------------


def test_the_command_that_opens_mlflow_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert look_into_mlflow("sqlite:///mlflow.db") == f"mlflow ui --backend-store-uri 'sqlite:///{folder}/mlflow.db'"
    assert look_into_mlflow("sqlite:////data/m.db") == "mlflow ui --backend-store-uri sqlite:////data/m.db"
    assert look_into_mlflow("https://me:word@host:5000") == "https://***@host:5000"


def test_a_cluster_that_is_gone_as_a_run_starts_is_refused_with_the_command_that_resumes(tmp_path: Path) -> None:
    root = RunFolder(tmp_path / "mine")
    for error in (ray.exceptions.ActorDiedError(), TuneError("...\nActorDiedError: The actor died unexpectedly")):
        with (
            refuses("cluster-unreachable", "Run mine failed", f"resume=mine run.dir={tmp_path}", error=RunFailedError),
            explained_loss(root),
        ):
            raise error
    with pytest.raises(TuneError, match="other"), explained_loss(root):
        raise TuneError("other")


def test_what_a_worker_prints_lies_in_the_folder_of_its_fold(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib; from raycv.orchestration.fold_worker import keep_output\n"
        "from raycv.results.run_folder import FoldFolder\n"
        f"keep_output(FoldFolder(pathlib.Path({str(tmp_path / 'fold_0')!r})))\n"
        "print('from Python', flush=True); os.write(2, b'from a library'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (-9, "")
    log = FoldFolder(tmp_path / "fold_0").log
    assert log.read_text().splitlines()[1:] == ["from Python", "from a library"]
    assert log.stat().st_mode & 0o077 == 0
