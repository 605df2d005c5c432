"""Scores a file of pairs chunk by chunk: reads, scores, writes."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from raycv.batch_inference.input_formats import pair_file
from raycv.batch_inference.output_place import check_output
from raycv.batch_inference.pairs import AskedPair, BadRow, Chunk, PairScore, PairSource, ScoredChunk, open_source
from raycv.batch_inference.state import Progress, identity_of, identity_of_input, takes_missing_as_text
from raycv.batch_inference.writer import ScoreFile, Stage
from raycv.config.schema import InferConfig, InferenceConfig
from raycv.data.types import Criterion
from raycv.errors import UserError, counted
from raycv.inference.choose import Chosen
from raycv.inference.questions import Prediction, Predicts, label_of, shown_threshold
from raycv.rendering.terminal import duration, say
from raycv.row_faults import listed

FIRST_BAD = 10
"""Bad rows that are printed. `<output>.errors.csv` has all of them."""
PLAIN_SECONDS = 30
"""Between two lines of progress where there is no terminal."""


class PairScorer(Predicts, Protocol):
    """An object that scores chunks: `raycv.inference.predictor.Predictor`."""

    attention: str
    """sdpa or eager"""
    earlier_attention: str
    """the one that versions which recorded none computed"""

    def check_pair(self, post: str, criterion: str) -> None:
        """Raises: UserError if `criterion` leaves no room for a word of `post`."""


Engine = Callable[[PairSource, int], Generator[ScoredChunk, None, None]]
"""Scores the chunks of a source after the given number of records, in their order."""


@dataclass(frozen=True)
class Recipe:
    """The parts of a scorer, for any process that makes one."""

    checkpoints: tuple[Path, ...]
    infer: InferenceConfig
    base: str | None = None

    def load(self, tell: Callable[[str], None]) -> PairScorer:
        """Makes the scorer. Raises: UserError if a checkpoint or its base model cannot be loaded."""
        from raycv.inference.predictor import Predictor

        return Predictor(self.checkpoints, self.infer, tell, self.base)


def check_asked(config: InferConfig) -> None:
    """Raises: UserError if the config asks for a file and a single post at once, or names no usable output."""
    given = [name for name in ("post", "post_file") if getattr(config, name) is not None]
    if given:
        what = f"input and {given[0]} are both given: many pairs, or one?"
        raise UserError(what, kind="config-value", remedies=[f"leave {given[0]} out", "leave input out"])
    check_output(Path(config.output), Path(str(config.input)))


def score_file(config: InferConfig, chosen: Chosen, criteria: Mapping[str, Criterion], engine: Engine) -> Progress:
    """Scores `config.input` into `config.output`.

    Returns:
        The counts of the whole output, including the parts of earlier runs.

    Raises:
        UserError: The input or the base model cannot be read, no row can be scored, or the output cannot be continued.
    """
    console = Console(stderr=True)
    source = open_source(Path(str(config.input)), criteria, config.criterion, missing=config.missing)
    output = ScoreFile(Path(config.output), source.layout.ids, chosen.fold, identity_of(source, chosen, config.base))
    if source.layout.others and source.layout.criterion is None and source.asked is None:
        unread = listed(list(source.layout.others))
        say(console, f"no column criterion, so each post is asked for every criterion; not read: {unread}")
    for notice in source.layout.notices:
        say(console, notice)
    with output.opened():
        begun, is_scored = output.progress, output.stage in (Stage.SCORED, Stage.MOVED)
        if output.stage is Stage.GROWING:
            say(console, f"continues after {counted(begun.records, 'record')}")
            source = _as_begun(source, begun, console)
        try:
            if not is_scored:
                _score(source, engine, output, console)
        except KeyboardInterrupt:
            records = output.progress.records
            kept = f"{counted(records, 'record')} scored and kept; the same command continues after"
            say(console, kept if records else "stopped before the first records were scored")
            raise
        if not is_scored and not identity_of_input(source).items() <= output.progress.identity.items():
            raise UserError(
                f"input={source.path} changed while it was scored: the scores may be of both its states.",
                kind="output-differs",
                remedies=["run the same command again: it says what to delete to start again"],
            )
        output.finish()
    say(console, summary(output))
    return output.progress


def _as_begun(source: PairSource, begun: Progress, console: Console) -> PairSource:
    """`source`, read as it was before the interruption. Tells what then differs from the command."""
    if source.missing == "text" or not takes_missing_as_text(begun.identity):
        return source
    say(console, "an earlier version began this file: NaN and the like stay text, as it began (missing=text)")
    return replace(source, missing="text")


def _score(source: PairSource, engine: Engine, output: ScoreFile, console: Console) -> None:
    """Scores the records that `output` does not cover yet."""
    begun = output.progress
    with closing(engine(source, begun.records)) as scored, ProgressView(console, source, begun) as view:
        for chunk in scored:
            output.append(chunk)
            view.update(chunk, output.progress)


def local_engine(load: Callable[[], PairScorer]) -> Engine:
    """Scores in this process. `load` is called once, when there is something to score."""

    def scored(source: PairSource, done: int) -> Generator[ScoredChunk, None, None]:
        scorer = None
        for chunk in source.chunks(done):
            scorer = scorer or load()
            yield score_chunk(chunk, scorer)

    return scored


def score_chunk(chunk: Chunk, scorer: PairScorer) -> ScoredChunk:
    """Scores a chunk. A pair that does not fit the prompt becomes a bad row."""
    pairs, unfit = chunk.pairs, []
    try:
        predictions = _predicted(pairs, scorer)
    except UserError:
        # A check of each pair costs as much as its preparation for the model, so we do it only now.
        faults = [_unfit(pair, scorer) for pair in pairs]
        unfit = [fault for fault in faults if fault]
        if not unfit:
            raise
        pairs = [pair for pair, fault in zip(pairs, faults, strict=True) if fault is None]
        predictions = _predicted(pairs, scorer)
    scores = [
        PairScore(
            pair.row,
            pair.ids,
            pair.criterion.criterion_id or None,
            label_of(prediction.score, scorer.threshold),
            prediction.score,
            prediction.truncated,
        )
        for pair, prediction in zip(pairs, predictions, strict=True)
    ]
    bad = sorted([*chunk.bad, *unfit], key=lambda row: row.line)
    return ScoredChunk(
        chunk.records,
        chunk.position,
        scorer.threshold,
        scorer.computed_in,
        scorer.attention,
        scorer.earlier_attention,
        scores,
        bad,
    )


def _predicted(pairs: Sequence[AskedPair], scorer: PairScorer) -> list[Prediction]:
    return scorer.predict([(pair.post, pair.criterion.text) for pair in pairs]) if pairs else []


def _unfit(pair: AskedPair, scorer: PairScorer) -> BadRow | None:
    """The bad row for `pair` if it does not fit the prompt, else None."""
    try:
        scorer.check_pair(pair.post, pair.criterion.text)
    except UserError as error:
        return BadRow(pair.row, pair.line, error.what)
    return None


class ProgressView:
    """Shows progress, time left and bad rows: a bar on a terminal, a line every PLAIN_SECONDS elsewhere."""

    def __init__(self, console: Console, source: PairSource, begun: Progress) -> None:
        self._console = console
        file = pair_file(source.path)
        self._place, self._total = file.place, max(file.total, 1)
        self._began = self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._shown = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(f"{begun.pairs:,} pairs", total=self._total, left="")

    def __enter__(self) -> "ProgressView":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, chunk: ScoredChunk, progress: Progress) -> None:
        """Shows a new chunk. `progress` has the counts including `chunk`."""
        for bad in chunk.bad[: max(FIRST_BAD - self._shown, 0)]:
            say(self._console, f"{self._place} {bad.line}: {bad.reason}")
        self._shown += len(chunk.bad)
        left = self._left(chunk.position)
        if self._shown > FIRST_BAD >= self._shown - len(chunk.bad):
            say(self._console, "further bad rows are in the file of errors alone")
        pairs = f"{progress.pairs:,} pairs scored" + (f", {counted(progress.bad, 'bad row')}" if progress.bad else "")
        self._bar.update(self._task, completed=chunk.position, description=pairs, left=left)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            share = min(chunk.position / self._total, 1)
            say(self._console, f"[{duration(now - self._began)}] {share:.0%}: {pairs}" + (left and f", {left}"))

    def _left(self, position: int) -> str:
        """Time left at the pace since the first chunk. The load of the model comes before it and does not count."""
        if self._first is None:
            self._first = position, time.monotonic()
            return ""
        start, began = self._first
        pace = (time.monotonic() - began) / max(position - start, 1)
        return f"about {duration(pace * max(self._total - position, 0))} left"


def summary(output: ScoreFile) -> str:
    """The lines that the user reads at the end."""
    progress = output.progress
    lines = [
        f"{counted(progress.pairs, 'pair')} scored, {progress.matched:,} matched (probability of "
        f"{shown_threshold(progress.threshold or 0)} or more): {output.output}"
    ]
    if progress.truncated:
        lines.append(f"{counted(progress.truncated, 'pair')}: the post was shortened to fit the prompt")
    if progress.bad:
        lines.append(f"{counted(progress.bad, 'bad row')} skipped: {output.errors}")
    return "\n".join(lines)


def facts(progress: Progress, config: InferConfig) -> tuple[dict[str, Any], dict[str, float]]:
    """Parameters and metrics for MLflow: counts, sizes and hashes, never text."""
    params = {
        "engine": config.engine,
        "threshold": progress.threshold,
        "precision": progress.precision,
        "input.bytes": progress.identity["the size of the input"],
        "input.sha256_of_the_first_mb": progress.identity["the beginning of the input"],
    }
    names: Sequence[str] = ("records", "pairs", "matched", "truncated", "bad")
    return params, {name: float(getattr(progress, name)) for name in names}
