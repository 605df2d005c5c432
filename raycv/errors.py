"""The errors that are meant for the user: printed without a traceback, exit code 2, or 1 for a failed run."""

import re
from collections.abc import Sequence
from typing import Literal

ErrorKind = Literal[
    "config-unknown-key", "config-value", "config-syntax", "data-file", "data-format", "data-id", "data-label",
    "data-text", "data-split", "base-files", "base-unsuitable", "base-changed", "hub-access", "hub-unreachable",
    "checkpoint-damaged", "run-missing", "run-exists", "run-busy", "run-damaged", "run-failed", "resume-differs",
    "runs-differ",
    "package-version", "package-damaged", "cluster-unreachable", "cluster-node", "cluster-resources",
    "gpu-unusable", "memory-full", "disk-full", "disk-unwritable", "tracking-unreachable", "tracking-store",
    "training-loss", "input-file", "input-empty", "criterion-unknown", "prompt-length", "output-exists",
    "output-differs", "better-not-shown", "not-reproduced", "bundle-differs", "storage-unreachable", "storage-refused",
    "scorer-failed", "scorer-unavailable", "scorer-request",
]  # fmt: skip
"""The stable short name of what went wrong. KINDS has the cause and cure of each."""

KINDS: dict[ErrorKind, tuple[str, str]] = {
    "config-unknown-key": (
        "A key or option that the command does not have was given.",
        "Correct its spelling; `--help` lists the keys of each command.",
    ),
    "config-value": (
        "A key has an impossible value, lacks one, or contradicts another key.",
        "Give the key a value that the message allows, or leave one of the two keys out.",
    ),
    "config-syntax": (
        "The command line is not made of `key=value` words that raycv can read.",
        "Write `key=value` without spaces, and quote texts and lists for the shell.",
    ),
    "data-file": (
        "A folder, table or file of the data set is missing, cannot be opened, or is not the only one of its kind.",
        "Put the file where the message says, or set `data.dir` or `data.criteria_dir`.",
    ),
    "data-format": (
        "A table is broken: encoding, quotes, separators, columns or JSON.",
        "Write the file again with a CSV library, as UTF-8, with the columns that the message names.",
    ),
    "data-id": (
        "Ids or pairs are missing, occur twice, or do not agree between the files.",
        "Make the ids agree, and keep one row for each pair of post and criterion.",
    ),
    "data-label": (
        "A label or symptom name is empty or unknown.",
        "Write labels as yes or no, 1 or 0, true or false, and correct symptom names.",
    ),
    "data-text": (
        "Posts or criteria are empty, or the base model cannot read them as text.",
        "Fill them in, rewrite or remove them, or set `data.empty=drop` for empty ones.",
    ),
    "data-split": (
        "The posts and labels do not suffice for the folds that were asked for.",
        "Lower `cv.folds`, try another `cv.seed`, or bring more posts with both labels.",
    ),
    "base-files": (
        "The base model is not there, or its files are incomplete or damaged.",
        "Correct `model.name`, or copy or download the model again.",
    ),
    "base-unsuitable": (
        "raycv cannot train or use this base model with these settings.",
        "Change the setting that the message names, or choose another base model.",
    ),
    "base-changed": (
        "The base model is not the one that the checkpoint was trained on.",
        "Put the files of training back, or name their folder: `base=<folder>`.",
    ),
    "hub-access": (
        "The model hub does not give the model or revision to you.",
        "Check the spelling of `model.name` and `model.revision`, accept the license, and log in.",
    ),
    "hub-unreachable": (
        "The model hub does not answer, or raycv is offline and its cache lacks the model.",
        "Try again when the hub answers, or give the folder of a copy as `model.name`.",
    ),
    "checkpoint-damaged": (
        "Files of a checkpoint are missing or damaged.",
        "Put a good copy back, or train that fold again.",
    ),
    "run-missing": (
        "The folder or store lacks that run, fold or checkpoint.",
        "Choose one that the message lists, or name the folder that holds it.",
    ),
    "run-exists": (
        "The run is there already, and raycv does not overwrite or repeat it.",
        "Choose another `run.name`, or use the command that the message gives.",
    ),
    "run-busy": (
        "Another process writes the run or the file.",
        "Wait until it ends, or stop it, and run the command again.",
    ),
    "run-damaged": (
        "A record in the run folder is missing, damaged or unreadable.",
        "Put a good copy in its place; MLflow may have one.",
    ),
    "run-failed": (
        "One or more folds failed or are not finished, so raycv made no report.",
        "Fix the cause that the message names, and resume the run.",
    ),
    "runs-differ": (
        "Runs that should be compared differ in posts, labels or folds.",
        "Train both on the same data, with the same `cv.folds` and `cv.seed`.",
    ),
    "resume-differs": (
        "Data, settings, base model, versions or device differ from those that the run began with.",
        "Put them back and resume, or start a new run.",
    ),
    "package-version": (
        "Another version of raycv wrote the file, and this one cannot use it.",
        "Use the version that wrote it, or start again.",
    ),
    "package-damaged": (
        "A file that ships with raycv is missing.",
        "Install raycv again.",
    ),
    "cluster-unreachable": (
        "Ray cannot be started or joined, or its cluster is gone.",
        "Check `RAY_ADDRESS` and `ray status`, and run or resume again.",
    ),
    "cluster-node": (
        "A node lacks the shared folder, the base model, or the driver's versions.",
        "Give the node what it lacks, and resume.",
    ),
    "cluster-resources": (
        "No node has the CPUs and GPUs that are asked for.",
        "Ask for less, or add a node.",
    ),
    "gpu-unusable": (
        "torch cannot use the GPU of this machine.",
        "Update the driver or torch, or compute on the CPU.",
    ),
    "memory-full": (
        "The fold does not fit into memory, even one pair at a time.",
        "Shorten prompts, or use a smaller model, or a larger GPU.",
    ),
    "disk-full": (
        "A disk is full.",
        "Make room on the disk that the message names, and run or resume again.",
    ),
    "disk-unwritable": (
        "A file or folder cannot be written.",
        "Choose a place that you may write to, or change its permissions.",
    ),
    "tracking-unreachable": (
        "MLflow does not answer, or refuses the request.",
        "Check `tracking.uri`, the server and the login, or track into a local file.",
    ),
    "tracking-store": (
        "The MLflow store cannot be used, or lacks the run.",
        "Name another store, or repair this one as the message says.",
    ),
    "storage-unreachable": (
        "The object storage does not answer.",
        "Check the network and `AWS_ENDPOINT_URL`, and type the command again; the message names what is kept locally.",
    ),
    "storage-refused": (
        "The object storage refuses the credentials, or lacks the bucket.",
        "Check the bucket's name, its region, and the credentials: `aws s3 ls` uses the same ones.",
    ),
    "training-loss": (
        "A loss or score is NaN or infinity.",
        "Lower `train.lr`, or compute in single precision.",
    ),
    "input-file": (
        "The file of a post or of pairs cannot be read, or its columns do not fit.",
        "Correct the path, the format or the columns that the message names.",
    ),
    "input-empty": (
        "The question lacks a post or a criterion.",
        "Give the text of a post and a criterion.",
    ),
    "criterion-unknown": (
        "The run has no criterion of that id or name.",
        "Choose one that the message lists, or describe it in your own words.",
    ),
    "prompt-length": (
        "The criterion and the question leave no room for a post in the prompt.",
        "Raise `prompt.max_length`, or shorten the criterion.",
    ),
    "output-exists": (
        "A file is in the place of the output.",
        "Name another output, or move the file away.",
    ),
    "output-differs": (
        "The output was begun with another input, model or setting, or was changed since.",
        "Run the command as it was, or start the output again.",
    ),
    "better-not-shown": (
        "`require=better` is set, and a run is not shown to be better than the baseline.",
        "Read the intervals, which the command writes all the same, or leave `require=` out.",
    ),
    "not-reproduced": (
        "Folds that were trained again have another F1 than the run recorded.",
        "Read which versions, hardware, source or settings differ, and put them back.",
    ),
    "bundle-differs": (
        "Files of a bundle for reviewers do not follow from its data.",
        "Ask the authors for the bundle again, and compare its SHA-256 with theirs.",
    ),
    "scorer-failed": (
        "A scorer did not start, or failed at a request.",
        "See its log, and try the model alone: `server=none`.",
    ),
    "scorer-unavailable": (
        "The scorer does not answer, or has too many requests waiting.",
        "Try again in a moment, start one, or compute locally: `server=none`.",
    ),
    "scorer-request": (
        "The scorer refuses the request: its form, its size or its token.",
        "Send what the page `/docs` of the scorer describes.",
    ),
}
"""Cause and cure of each kind, which docs/reference/errors.md lists."""

_LABEL = "Kind: "
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(Exception):
    """A fault that the user can fix: a config value, a file, a missing model, an unreachable service.

    The message names the fault, the value and the next step, and ends with the kind. It never holds the text of a post.
    """

    exit_code = 2

    def __init__(self, what: str, *, kind: ErrorKind | tuple[ErrorKind, ...], remedies: Sequence[str] = ()) -> None:
        """Stores the parts of the message.

        Args:
            what: The fault in one or more sentences.
            kind: Its kind, or the kinds of several faults that are reported together.
            remedies: The next steps. Several are printed with numbers.
        """
        self.what = what
        self.kinds = tuple(dict.fromkeys(kind)) if isinstance(kind, tuple) else (kind,)
        self.remedies = list(remedies)
        super().__init__(self._text())

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel from workers to the driver. Pickle would call the constructor with the whole text, so we pass
        # the parts.
        return _rebuild, (self.what, self.kinds, self.remedies)

    @property
    def kind(self) -> ErrorKind:
        """The kind; the first of several."""
        return self.kinds[0]

    def _text(self) -> str:
        lines = [self.what]
        if len(self.remedies) == 1:
            lines.append(f"  What to do: {self.remedies[0]}")
        elif self.remedies:
            lines.append("What to do:")
            lines += [f"  {i}. {remedy}" for i, remedy in enumerate(self.remedies, 1)]
        return "\n".join([*lines, f"  {_LABEL}{', '.join(self.kinds)}"])


def together(errors: Sequence[UserError]) -> UserError:
    """Joins one or more errors into one, with the remedies of each."""
    if len(errors) == 1:
        return errors[0]
    remedies = [remedy for error in errors for remedy in error.remedies]
    kinds = tuple(kind for error in errors for kind in error.kinds)
    return UserError("\n".join(error.what for error in errors), kind=kinds, remedies=list(dict.fromkeys(remedies)))


def known_kind(name: object, otherwise: ErrorKind) -> ErrorKind:
    """`name` if it is a kind, else `otherwise`: what another version of raycv wrote or sent can lack one."""
    return next((kind for kind in KINDS if kind == name), otherwise)


def last_line(error: BaseException) -> str:
    """The last line of an error's text, but not that of its kind; the error's type if it has no text."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line and not line.startswith(_LABEL)), type(error).__name__)


def _rebuild(what: str, kinds: tuple[ErrorKind, ...], remedies: Sequence[str]) -> UserError:
    return UserError(what, kind=kinds, remedies=remedies)


class RunFailedError(UserError):
    """A failure of the run itself, not of its input: a fold died, or training failed. Printed like any user error."""

    exit_code = 1


class NotShownError(UserError):
    """A comparison does not show what the user requires, or a run or bundle differs. Scripts see the exit code 1."""

    exit_code = 1


class FaultsError(UserError):
    """All faults that one pass over a config or a data set found, reported together."""

    def __init__(
        self,
        title: str,
        faults: Sequence[str],
        *,
        kind: ErrorKind | tuple[ErrorKind, ...],
        remedies: Sequence[str] = (),
        most: int = 50,
    ) -> None:
        """Builds the list of faults.

        Args:
            title: The first line of the message, before the number of faults.
            faults: The faults, a line each.
            kind: Their kind or kinds.
            remedies: The next steps.
            most: Faults to print at most. The message counts the rest.
        """
        self.faults = list(faults)
        shown = [f"  - {fault}" for fault in self.faults[:most]]
        if len(self.faults) > most:
            shown.append(f"  ... and {len(self.faults) - most} more")
        what = f"{title}: {counted(len(self.faults), 'fault')}\n" + "\n".join(shown)
        super().__init__(what, kind=kind, remedies=remedies)


def counted(number: float, noun: str) -> str:
    """A number with its noun: `1 fold`, `2 folds`, `0.5 folds`, `1,000,000 folds`."""
    shown = f"{number:,g}" if isinstance(number, float) else f"{number:,}"
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"


def first_of(names: Sequence[str], most: int) -> str:
    """The first `most` of `names` for a message, and the number of the others."""
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def printable(text: str) -> str:
    """`text` for a terminal: codes replace control characters, except line breaks and tabs."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def shown(value: object, most: int = 40) -> str:
    """`value` for a message: quoted if short, else its length only, since a shifted column can hold post text."""
    text = str(value)
    return repr(text) if len(text) <= most else f"a value of {len(text)} characters"
