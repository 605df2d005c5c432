"""The generator: same bytes every time, the published counts, and sentences that are hard for the right reason."""

import csv
import hashlib
import random
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest
from support.refusals import refuses

from raycv.data.phrases import EVIDENCE, HARD_NEGATIVE_KINDS, NEUTRAL, compose, expansions, phrase_book
from raycv.data.synthetic import (
    CRITERIA,
    DATASET_FILES,
    LENGTH_PROFILES,
    REDSM5_POSITIVES,
    SYNTHETIC_MARK,
    SyntheticPost,
    criteria_grid,
    generate_posts,
    write_dataset,
)
from raycv.data.types import SYMPTOMS

ROOT = Path(__file__).parents[1]
SAMPLE = {"posts": 110, "seed": 7, "profile": "short"}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in DATASET_FILES}


@pytest.fixture(scope="module")
def full() -> list[SyntheticPost]:
    """The full-size set, 1484 posts of realistic length."""
    return generate_posts(1484, seed=7, lengths=LENGTH_PROFILES["realistic"])


def labelled_sentences(posts: list[SyntheticPost]) -> list:
    return [sentence for post in posts for sentence in post.sentences if sentence.kind != NEUTRAL]


class TestDeterminism:
    def test_same_seed_same_bytes(self, tmp_path):
        write_dataset(tmp_path / "a", posts=60, seed=3)
        write_dataset(tmp_path / "b", posts=60, seed=3)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_bytes_do_not_depend_on_the_platform(self, tmp_path):
        write_dataset(tmp_path, posts=60, seed=3)
        assert not any(b"\r" in data for data in contents(tmp_path).values())
        digest = hashlib.sha256((tmp_path / "posts.csv").read_bytes()).hexdigest()
        assert digest == "71f42e1100d99c4bd14587a7fccf13c3a995029a9566311ec321a49ea493274d"

    def test_another_seed_gives_other_posts(self, tmp_path):
        write_dataset(tmp_path / "a", posts=60, seed=3)
        write_dataset(tmp_path / "b", posts=60, seed=4)
        texts = [{row["post"] for row in rows(tmp_path / name / "posts.csv")} for name in "ab"]
        assert len(texts[0] & texts[1]) <= 2

    def test_committed_sample_is_what_the_generator_makes_now(self, tmp_path):
        write_dataset(tmp_path, **SAMPLE)
        assert contents(tmp_path) == contents(ROOT / "data" / "sample")

    def test_writing_again_over_a_synthetic_set_is_allowed(self, tmp_path):
        write_dataset(tmp_path, posts=60, seed=3)
        write_dataset(tmp_path, posts=20, seed=4)
        assert len(rows(tmp_path / "posts.csv")) == 20


class TestFullSize:
    @pytest.mark.long
    def test_counts_and_skew_are_the_published_ones(self, full):
        per_symptom = Counter(symptom for post in full for symptom in post.symptoms)
        assert len(full) == 1484
        assert per_symptom == REDSM5_POSITIVES
        assert per_symptom.total() == 1292
        assert sum(not post.symptoms for post in full) == 392

    def test_lengths(self, full):
        words = [len(post.text.split()) for post in full]
        assert mean(words) == pytest.approx(295, rel=0.05)
        assert min(words) == 2
        assert 3000 <= max(words) <= 7000
        # About 1.25 Llama tokens per word and 45 tokens of question: a quarter of the prompts exceeds 512 tokens.
        assert 0.20 <= mean(count * 1.25 + 45 > 512 for count in words) <= 0.30

    def test_evidence_stands_anywhere_in_long_posts(self, full):
        places = [
            index / (len(post.sentences) - 1)
            for post in full
            if len(post.text.split()) > 400
            for index, sentence in enumerate(post.sentences)
            if sentence.kind == EVIDENCE
        ]
        quarters = Counter(min(3, int(4 * place)) for place in places)
        assert min(quarters[quarter] for quarter in range(4)) > 0.15 * len(places)

    def test_length_says_little_about_the_label(self, full):
        with_symptom = [len(post.text.split()) for post in full if post.symptoms]
        without = [len(post.text.split()) for post in full if not post.symptoms]
        assert mean(with_symptom) == pytest.approx(mean(without), rel=0.35)

    def test_post_ids_say_nothing_about_the_label(self, full):
        halves = full[:742], full[742:]
        rates = [mean(len(post.symptoms) for post in half) for half in halves]
        assert rates[0] == pytest.approx(rates[1], rel=0.15)


class TestSentences:
    def test_evidence_is_there_exactly_for_the_positive_symptoms(self, full):
        for post in full:
            assert {s.symptom for s in post.sentences if s.kind == EVIDENCE} == post.symptoms
            assert not post.symptoms & {s.symptom for s in post.sentences if s.kind in HARD_NEGATIVE_KINDS}

    def test_every_sentence_stands_in_the_text(self, full):
        assert all(sentence.text in post.text for post in full for sentence in post.sentences)

    def test_hard_negatives_of_every_kind_and_symptom(self, full):
        pairs = {(s.symptom, s.kind) for s in labelled_sentences(full)}
        assert pairs == {(symptom, kind) for symptom in SYMPTOMS for kind in (EVIDENCE, *HARD_NEGATIVE_KINDS)}

    def test_most_sample_posts_hold_a_hard_negative(self):
        posts = generate_posts(110, seed=7, lengths=LENGTH_PROFILES["short"])
        assert mean(any(s.kind in HARD_NEGATIVE_KINDS for s in post.sentences) for post in posts) > 0.6

    def test_half_of_the_labelled_sentences_are_held_out_phrasings(self, full):
        assert mean(s.held_out for s in labelled_sentences(full)) == pytest.approx(0.5, abs=0.03)

    def test_compose_without_held_out_phrasings(self):
        rng = random.Random(0)
        made = [s for _ in range(200) for s in compose(rng, [*SYMPTOMS][:2], 60, held_out_rate=0.0)]
        assert not any(sentence.held_out for sentence in made)

    def test_evidence_is_kept_when_the_word_target_is_tiny(self):
        made = compose(random.Random(0), ["FATIGUE"], 2, held_out_rate=0.5)
        assert {sentence.kind for sentence in made} == {EVIDENCE}


class TestPhraseBook:
    def test_every_symptom_has_seen_and_held_out_phrasings_of_every_kind(self):
        for symptom in SYMPTOMS:
            for kind in (EVIDENCE, *HARD_NEGATIVE_KINDS):
                phrasings = phrase_book()[symptom, kind]
                assert len(phrasings.seen) >= 2
                assert len(phrasings.held_out) >= 2

    def test_seen_and_held_out_phrasings_are_disjoint(self):
        def every_text(half: str) -> set[str]:
            templates = [t for phrasings in phrase_book().values() for t in getattr(phrasings, half)]
            return {text.lower() for template in templates for text in expansions(template)}

        assert not every_text("seen") & every_text("held_out")

    def test_no_text_belongs_to_two_symptoms_or_kinds(self):
        owner: dict[str, tuple[str, str]] = {}
        for key, phrasings in phrase_book().items():
            for template in (*phrasings.seen, *phrasings.held_out):
                for text in expansions(template):
                    assert owner.setdefault(text, key) == key, text

    def test_expansions(self):
        assert expansions("I am {so|very} {tired|low}") == {
            *("I am so tired", "I am so low", "I am very tired", "I am very low")
        }


class TestFiles:
    def test_schema(self, tmp_path):
        stats = write_dataset(tmp_path, posts=40, seed=1, profile="short")
        posts, truth, criteria = (rows(tmp_path / f"{name}.csv") for name in ("posts", "groundtruth", "criteria"))
        assert list(posts[0]) == ["post_id", "post"]
        assert list(truth[0]) == ["post_id", "criterion_id", "label"]
        assert list(criteria[0]) == ["criterion_id", "criterion", "symptom"]
        assert [row["criterion_id"] for row in criteria] == [f"A.{i}" for i in range(1, 10)]
        assert {(row["post_id"], row["criterion_id"]) for row in truth} == {
            (post["post_id"], criterion["criterion_id"]) for post in posts for criterion in criteria
        }
        assert len(truth) == stats["pairs"] == 360
        assert Counter(row["label"] for row in truth)["yes"] == stats["positives"]
        assert all(row["post"].strip() for row in posts)

    def test_readme_says_synthetic_and_how_it_was_made(self, tmp_path):
        write_dataset(tmp_path, posts=40, seed=1, profile="short")
        readme = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert readme.startswith(f"# {SYNTHETIC_MARK}: not about real people, not ReDSM5")
        assert "python -m raycv.synthesize posts=40 seed=1 profile=short out=..." in readme
        assert str(tmp_path) not in readme

    def test_words_mean_overrides_the_profile(self, tmp_path):
        stats = write_dataset(tmp_path, posts=200, seed=1, words_mean=120)
        assert stats["words_mean"] == pytest.approx(120, rel=0.1)

    def test_wide_grid_repeats_the_criteria(self, tmp_path):
        stats = write_dataset(tmp_path, posts=30, seed=1, profile="short", criteria=27)
        labels = {(row["post_id"], row["criterion_id"]): row["label"] for row in rows(tmp_path / "groundtruth.csv")}
        assert stats["pairs"] == len(labels) == 30 * 27
        assert all(labels[post, "A.4"] == labels[post, "A.4.3"] for post, _ in labels)
        assert len({criterion.criterion_id for criterion in criteria_grid(27)}) == 27

    @pytest.mark.parametrize("posts", [1, 2, 5, 13])
    def test_tiny_sets(self, tmp_path, posts):
        assert write_dataset(tmp_path, posts=posts, seed=1)["posts"] == posts

    def test_committed_criteria_are_those_of_the_generator(self):
        texts = [
            ROOT.joinpath("data", folder, "criteria.csv").read_text(encoding="utf-8") for folder in ("dsm5", "sample")
        ]
        assert texts[0] == texts[1]
        assert [tuple(row.values()) for row in rows(ROOT / "data" / "dsm5" / "criteria.csv")] == [
            (criterion.criterion_id, criterion.text, criterion.symptom) for criterion in CRITERIA
        ]


class TestRefusals:
    def test_all_faults_at_once(self, tmp_path):
        with refuses("config-value", "posts=0", "profile='tall'", "words_mean=1", "criteria=28"):
            write_dataset(tmp_path / "out", posts=0, seed=1, profile="tall", words_mean=1, criteria=28)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["redsm5_posts.csv", "posts.csv"])
    def test_never_mixes_with_other_data(self, tmp_path, name):
        (tmp_path / name).write_text("post_id,text\n", encoding="utf-8")
        with refuses("output-exists", f"{tmp_path} ", name, "out="):
            write_dataset(tmp_path, posts=5, seed=1)
        assert (tmp_path / name).read_text(encoding="utf-8") == "post_id,text\n"

    def test_refuses_the_folder_of_the_gated_data(self):
        with refuses("output-exists", f"{ROOT / 'data' / 'redsm5'} ", "README.md", "out="):
            write_dataset(ROOT / "data" / "redsm5", posts=5, seed=1)
