"""A run that is under way: its config, folder and MLflow parent, and how it ends."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from raycv.common.locations import WORK, place_of, runs_folder
from raycv.config.process import ignore_stops
from raycv.config.schema import RunConfig
from raycv.errors import RunFailedError, UserError
from raycv.rendering.terminal import say
from raycv.results.run_folder import RunFolder, aggregate_command, report_command, resume_command
from raycv.results.storage import RECORDS, PublishedRun, persistently

if TYPE_CHECKING:
    from raycv.orchestration.fold_task import Prepared
    from raycv.tracking.cross_validation import CrossValidationStore


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder and MLflow parent exist."""

    config: RunConfig
    """with the name that the run has now"""
    folder: RunFolder
    store: "CrossValidationStore"
    parent_id: str
    """the id of the parent run in MLflow"""
    console: Console
    make_ready: Callable[[], None] | None = None
    """for a resumed run: prepares its folder and MLflow parent before its folds start"""

    @property
    def params(self) -> dict[str, str]:
        """The config as parameters of MLflow."""
        from raycv.tracking.cross_validation import flat_params

        return flat_params(self.config.model_dump())

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """Ends the MLflow parent run as FINISHED, FAILED or KILLED when the block ends.

        A run that has its report is complete; only MLflow may lack something.
        """
        status = "FAILED"
        try:
            if self.make_ready is not None:
                self.make_ready()
            yield
            # Without a report, `cv.only` left folds for later.
            status = "KILLED"
        except KeyboardInterrupt:
            ignore_stops()
            status = "KILLED"
            finished = len(self.folder.finished(self.config.cv.folds))
            kept = f"{finished} of {self.config.cv.folds} folds are finished, and kept in {self.folder.root}"
            say(self.console, f"Interrupted: {kept}\n{self._what_is_left()}\nStopping Ray ...")
            raise
        except RunFailedError:
            raise  # Its message has the command to resume.
        except Exception:
            say(self.console, f"The run stopped early.\n{self._what_is_left()}")
            raise
        finally:
            if self.folder.report.is_file():
                status = "FINISHED"
            # A store that is away may hide neither a result nor the error that ended the run.
            with contextlib.suppress(UserError):
                self.store.finish_family(self.parent_id, status)

    def record_pairs(self, prepared: "Prepared") -> None:
        """Writes what a later report needs beside the predictions. A fault there only warns: it may lose no result."""
        from raycv.results.pair_records import write_pair_records

        try:
            with self.console.status("Recording floors and near-duplicates"):
                write_pair_records(self.folder, prepared.dataset, prepared.splits, prepared.encoded.shortened)
        except Exception as error:  # noqa: BLE001  (days of training may be in the folder)
            # The text of an unexpected error may hold a part of a post, so we print its kind only.
            why = error.what if isinstance(error, UserError) else type(error).__name__
            lost = "a report of this run will lack floors, shortened posts, hard negatives or near-duplicates"
            say(self.console, f"Warning: {lost}, since they could not be recorded: {why}", "yellow")

    def make_page(self) -> dict[str, Any] | None:
        """Computes the statistics and writes the page. A fault there only warns: the run is complete without them.

        Returns:
            The content of `evaluation.json`, or None after a fault.
        """
        from raycv.rendering.publish import publish

        try:
            with self.console.status("Computing the statistics"):
                return publish(self.folder)
        except Exception as error:  # noqa: BLE001  (the report is written, and may hold days of training)
            why = error.what if isinstance(error, UserError) else type(error).__name__
            later = f"Make it later: {report_command(self.folder)}"
            say(self.console, f"Warning: the page of the run could not be made: {why}\n{later}", "yellow")
            return None

    def log(self, report: dict[str, Any] | None) -> None:
        """Logs the folds that MLflow lacks, the summary (None if folds are missing), and the best fold as a model.

        If MLflow refuses, it only warns.
        """
        from raycv.tracking.model import log_best_fold

        lacking, why = "the summary is not in MLflow", None
        try:
            self.store.log_missing_folds(self.parent_id, self.folder, self.config.cv.folds, self.params)
            if report is not None:
                self.store.log_report(self.parent_id, report, self.folder)
            if self.make_ready is not None:
                self.store.log_files(self.parent_id, [self.folder.environment])
            if report is not None:
                lacking = "the model of the best fold is not in MLflow"
                why = log_best_fold(self.store, self.parent_id, self.folder, report)
        except UserError as error:
            why = error.what
        if why is not None:
            later = f"Log it later: {aggregate_command(self.folder)}" if report else self._what_is_left()
            say(self.console, f"Warning: {lacking}: {why}\n{later}", "yellow")

    def publish_records(self) -> None:
        """Publishes the records of a run in an object storage. A storage that does not answer only warns."""
        run = PublishedRun.of(self.folder, WORK)
        if run is None:
            return
        try:
            run.publish(RECORDS)
            say(self.console, f"Published at: {run.bucket.address}")
        except UserError as error:
            later = "The run continues here, and publishes its records at its end."
            say(self.console, f"Warning: {error.what} {later}", "yellow")

    def publish(self) -> None:
        """Publishes what the object storage of the run, if it has one, still lacks. Waits for it for ten minutes.

        Raises:
            RunFailedError: The storage does not answer, or it refuses. The local copy has everything.
        """
        run = PublishedRun.of(self.folder, WORK)
        if run is None:
            return

        def tell(text: str) -> None:
            say(self.console, f"Warning: {text} Everything is kept in {self.folder.root}", "yellow")

        try:
            persistently(lambda: run.publish_all(self.config.cv.folds), tell)
        except UserError as error:
            whole = self.folder.report.is_file()
            raise RunFailedError(
                f"Run {self.folder.root.name} is {'complete' if whole else 'kept'}, but not published: {error.what} "
                f"Nothing is lost: all of it is in {self.folder.root}.",
                kind=error.kinds,
                remedies=[
                    *error.remedies,
                    f"publish it later, on this machine: {aggregate_command(self.folder)}"
                    if whole
                    else f"resume it later, on this machine: {resume_command(self.folder, self.config.cv.only)}",
                ],
            ) from error
        copy = runs_folder(place_of(self.folder.root)) if self.folder.report.is_file() else self.folder.root
        say(self.console, f"Published:     {run.bucket.address}\nCopy here:     {copy}")

    def _what_is_left(self) -> str:
        """Tells what to type after a run that stopped early."""
        if self.folder.report.is_file():
            log = f"Log it into MLflow: {aggregate_command(self.folder)}"
            return f"The run is complete, its report is {self.folder.report}\n{log}"
        return f"Resume it: {resume_command(self.folder, self.config.cv.only)}"
