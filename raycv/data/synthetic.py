"""Makes a synthetic data set: number, symptoms and lengths of its posts, and the files. No person wrote these posts.

A post is a shuffled row of sentences: evidence, hard negatives and neutral filler. Evidence is there for each positive
criterion. Hard negatives are about criteria that the post does not meet: negated, about somebody else, or past. Every
sentence comes from the phrase book `phrases.txt`. Half of the evidence and of the hard negatives use phrasings marked
`~`. The tiny base in `models/tiny_llama` never saw these in its pre-training, so a data set asks for more than recall.

Counts, skew and lengths follow the published figures of ReDSM5 (arXiv 2508.03399). Its text was neither read nor
paraphrased. The same arguments give the same bytes on every platform. `random.Random` is the only source of chance,
files are UTF-8, and a line feed ends each line.
"""

import csv
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, mean
from typing import Any

from raycv.common.files import unwritable
from raycv.common.locations import bundled
from raycv.data.phrases import NEUTRAL, Sentence, compose, paragraphs, phrase_book, spell
from raycv.data.types import SYMPTOMS, Criterion
from raycv.errors import FaultsError, UserError

# These are our own paraphrases, not the wording of the DSM-5. A single sentence counts as evidence, so they name no
# durations.
CRITERIA = (
    Criterion("A.1", "Mood is low: feels sad, empty, tearful or without hope", "DEPRESSED_MOOD"),
    Criterion("A.2", "No longer enjoys or cares about things that used to matter", "ANHEDONIA"),
    Criterion("A.3", "Eats far less or far more than usual, or weight shifts without trying", "APPETITE_CHANGE"),
    Criterion("A.4", "Sleeps badly, or sleeps far too much", "SLEEP_ISSUES"),
    Criterion("A.5", "Body has slowed down, or is too restless to keep still", "PSYCHOMOTOR"),
    Criterion("A.6", "Is worn out, with little strength left for ordinary things", "FATIGUE"),
    Criterion("A.7", "Thinks badly of oneself: useless, a burden or always at fault", "WORTHLESSNESS"),
    Criterion("A.8", "Finds it hard to focus, to think clearly or to make up one's mind", "COGNITIVE_ISSUES"),
    Criterion("A.9", "Thinks about being dead or wishes not to be alive", "SUICIDAL_THOUGHTS"),
)

# These published counts of ReDSM5 are scaled to the requested number of posts.
REDSM5_POSTS = 1484
REDSM5_POSTS_WITHOUT_SYMPTOM = 392
REDSM5_POSITIVES = dict(zip(SYMPTOMS, (328, 124, 44, 102, 35, 124, 311, 59, 165), strict=True))
MOST_SYMPTOMS_PER_POST = 4

HELD_OUT_RATE = 0.5

SYNTHETIC_MARK = "SYNTHETIC DATA"
DATASET_FILES = ("posts.csv", "groundtruth.csv", "criteria.csv", "README.md")


@dataclass(frozen=True, slots=True)
class LengthProfile:
    """The distribution of the words per post: log-normal, clipped to [words_min, words_max]."""

    words_mean: float
    sigma: float
    """Standard deviation of the natural logarithm of the words per post."""
    words_min: int
    words_max: int
    stub_rate: float
    """Share of posts that are only a title or a greeting of 2 to 4 words. They meet no criterion."""
    sentences_per_paragraph: int

    def words(self, posts: int) -> list[int]:
        """Word targets of `posts` posts, ascending: quantile midpoints, so that every size has the same shape."""
        normal = NormalDist(math.log(self.words_mean) - self.sigma**2 / 2, self.sigma)
        drawn = [round(math.exp(normal.inv_cdf((i + 0.5) / posts))) for i in range(posts)]
        return [min(max(words, self.words_min), self.words_max) for words in drawn]


LENGTH_PROFILES = {
    # With a few sentences per post a CPU trains in seconds.
    "short": LengthProfile(34, 0.45, 10, 90, stub_rate=0.0, sentences_per_paragraph=1000),
    # ReDSM5 has mean 294.7, min 2 and max 6990. About a quarter of the prompts exceed 512 Llama tokens.
    "realistic": LengthProfile(295, 1.0, 2, 6990, stub_rate=0.005, sentences_per_paragraph=6),
}


@dataclass(frozen=True, slots=True)
class SyntheticPost:
    """A post with its sentences in reading order, and the symptoms for which it is positive."""

    post_id: str
    text: str
    symptoms: frozenset[str]
    sentences: tuple[Sentence, ...]


def write_dataset(
    out: Path, *, posts: int, seed: int, profile: str = "realistic", words_mean: float | None = None, criteria: int = 9
) -> dict[str, Any]:
    """Writes DATASET_FILES into a folder.

    Args:
        out: The folder, made if missing. It may hold an earlier synthetic data set, but no other data, and must not be
            the sample that ships with raycv.
        posts: Number of posts; 1484 is the size of ReDSM5.
        seed: Seed of all chance. Data sets of different seeds share phrasings, not posts.
        profile: A key of LENGTH_PROFILES.
        words_mean: Mean words per post instead of the profile's.
        criteria: Number of criteria. Above nine they repeat under suffixed ids with equal labels (for cost studies).

    Returns:
        The statistics that the README of the data set states.

    Raises:
        UserError: A value is out of range, `out` holds other data, or `out` cannot be read or written.
    """
    _check_arguments(posts, profile, words_mean, criteria)
    with _told_of(out):
        _refuse_to_mix(out)
    lengths = LENGTH_PROFILES[profile]
    if words_mean is not None:
        lengths = replace(lengths, words_mean=words_mean)
    made = generate_posts(posts, seed=seed, lengths=lengths)
    grid = criteria_grid(criteria)
    command = f"python -m raycv.synthesize posts={posts} seed={seed} profile={profile}"
    command += f" words_mean={words_mean}" if words_mean is not None else ""
    command += f" criteria={criteria}" if criteria != len(CRITERIA) else ""
    stats = _statistics(made, grid)

    with _told_of(out):
        out.mkdir(parents=True, exist_ok=True)
        # The README marks the data as synthetic, so we write it first, in case the writing is interrupted.
        (out / "README.md").write_text(_readme(command, stats), encoding="utf-8", newline="\n")
        _write_csv(out / "posts.csv", ("post_id", "post"), ((post.post_id, post.text) for post in made))
        _write_csv(
            out / "groundtruth.csv",
            ("post_id", "criterion_id", "label"),
            ((p.post_id, c.criterion_id, "yes" if c.symptom in p.symptoms else "no") for p in made for c in grid),
        )
        _write_csv(
            out / "criteria.csv",
            ("criterion_id", "criterion", "symptom"),
            ((c.criterion_id, c.text, c.symptom) for c in grid),
        )
    return stats


def generate_posts(posts: int, *, seed: int, lengths: LengthProfile) -> list[SyntheticPost]:
    """Makes posts with ReDSM5's share of posts without symptom and its skew over the criteria, in random order."""
    rng = random.Random(f"raycv-dataset-{seed}")
    symptoms = _assign_symptoms(posts, rng)
    words = lengths.words(posts)
    rng.shuffle(words)
    stubs = set([i for i, present in enumerate(symptoms) if not present][: round(lengths.stub_rate * posts)])
    width = max(4, len(str(posts - 1)))
    made = []
    for index, present in enumerate(symptoms):
        if index in stubs:
            sentences = [Sentence(spell(rng.choice(phrase_book()["STUB", NEUTRAL].seen), rng), NEUTRAL)]
        else:
            sentences = compose(rng, sorted(present), words[index], held_out_rate=HELD_OUT_RATE)
        text = paragraphs(sentences, lengths.sentences_per_paragraph)
        made.append(SyntheticPost(f"s{index:0{width}d}", text, frozenset(present), tuple(sentences)))
    return made


def criteria_grid(count: int) -> list[Criterion]:
    """The first `count` criteria. After the ninth they repeat as A.1.2, A.2.2, ... with the same wording."""
    grid = []
    for index in range(count):
        criterion, copy = CRITERIA[index % len(CRITERIA)], 1 + index // len(CRITERIA)
        suffix = f".{copy}" if copy > 1 else ""
        grid.append(replace(criterion, criterion_id=criterion.criterion_id + suffix))
    return grid


def _assign_symptoms(posts: int, rng: random.Random) -> list[set[str]]:
    """Draws the symptoms of each post by the scaled published counts, in random order.

    As many posts as in ReDSM5, to scale, get no symptom. Every other post gets at least one.
    """
    scale = posts / REDSM5_POSTS
    deck = [symptom for symptom, count in REDSM5_POSITIVES.items() for _ in range(round(count * scale))]
    rng.shuffle(deck)
    labelled = min(posts - round(REDSM5_POSTS_WITHOUT_SYMPTOM * scale), len(deck))
    symptoms: list[set[str]] = [{symptom} for symptom in deck[:labelled]]
    for symptom in deck[labelled:]:
        rng.choice([s for s in symptoms if symptom not in s and len(s) < MOST_SYMPTOMS_PER_POST]).add(symptom)
    symptoms += [set() for _ in range(posts - labelled)]
    rng.shuffle(symptoms)
    return symptoms


# --- files -------------------------------------------------------------------------------------------------------


def _check_arguments(posts: int, profile: str, words_mean: float | None, criteria: int) -> None:
    faults = []
    if posts < 1:
        faults.append(f"posts={posts}: must be at least 1")
    if profile not in LENGTH_PROFILES:
        faults.append(f"profile={profile!r}: must be one of {', '.join(LENGTH_PROFILES)}")
    if words_mean is not None and not 5 <= words_mean <= 5000:
        faults.append(f"words_mean={words_mean}: must lie in 5..5000 words")
    if not 1 <= criteria <= 3 * len(CRITERIA):
        faults.append(f"criteria={criteria}: must lie in 1..{3 * len(CRITERIA)}")
    if faults:
        raise FaultsError("Synthetic data set", faults, kind="config-value")


@contextmanager
def _told_of(out: Path) -> Iterator[None]:
    """Turns an OSError of the block into a UserError about `out`."""
    try:
        yield
    except OSError as error:
        remedies = ["choose a folder that you may write to: out=<folder>"]
        raise unwritable("The data set", out, error, remedies) from error


def _refuse_to_mix(out: Path) -> None:
    """Refuses a folder with other data, which synthetic posts must not replace or mix with.

    Raises:
        UserError: `out` is not a folder, is the bundled sample, or holds files that are not a synthetic data set.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is not a folder.", kind="output-exists", remedies=["Give a new folder as out=..."])
    if out.resolve() == bundled("data/sample").resolve():
        raise UserError(
            f"{out} is the sample that ships with raycv and that the quickstart runs on.",
            kind="output-exists",
            remedies=["give another folder as out=...", "to make it again, remove it first"],
        )
    readme = out / "README.md"
    marked = readme.is_file() and SYNTHETIC_MARK in readme.read_text(encoding="utf-8", errors="replace")
    strangers = sorted(path.name for path in out.iterdir() if not marked or path.name not in DATASET_FILES)
    if strangers:
        raise UserError(
            f"{out} holds files that are not a synthetic data set: {', '.join(strangers[:5])}",
            kind="output-exists",
            remedies=["Give an empty or a new folder as out=..."],
        )


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _statistics(made: Sequence[SyntheticPost], grid: Sequence[Criterion]) -> dict[str, Any]:
    """Counts of the data set, without text. White space separates words."""
    words = [len(post.text.split()) for post in made]
    per_symptom = Counter(symptom for post in made for symptom in post.symptoms)
    positives = {criterion.criterion_id: per_symptom[str(criterion.symptom)] for criterion in grid}
    return {
        "posts": len(made),
        "criteria": len(grid),
        "pairs": len(made) * len(grid),
        "positives": sum(positives.values()),
        "positive_rate": sum(positives.values()) / (len(made) * len(grid)),
        "positives_per_criterion": positives,
        "posts_without_symptom": sum(not post.symptoms for post in made),
        "words_mean": mean(words),
        "words_min": min(words),
        "words_max": max(words),
    }


def _readme(command: str, stats: dict[str, Any]) -> str:
    positives = ", ".join(f"{name} {count}" for name, count in stats["positives_per_criterion"].items())
    return f"""# {SYNTHETIC_MARK}: not about real people, not ReDSM5

Every post here was put together by a program from a fixed book of phrases. No person wrote these posts and none is
described in them; no text of ReDSM5 or of any other corpus was used. Scores on this data say that the software works,
and nothing about real posts. Not for diagnosis.

Made by (`out` is this folder):

    {command} out=...

- {stats["posts"]} posts x {stats["criteria"]} criteria = {stats["pairs"]} pairs
- {stats["positives"]} positive ({100 * stats["positive_rate"]:.2f} %): {positives}
- {stats["posts_without_symptom"]} posts meet no criterion
- words per post: mean {stats["words_mean"]:.1f}, min {stats["words_min"]}, max {stats["words_max"]}

Files: `posts.csv` (post_id, post), `groundtruth.csv` (post_id, criterion_id, label: yes or no) and `criteria.csv`
(criterion_id, criterion, symptom). The criteria are own paraphrases, not the wording of the DSM-5.
"""
