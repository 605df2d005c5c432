"""Prompts as token arrays with real tokenizers: nothing that matters is cut, and what is cut is counted."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support.builders import BOS, SENTENCES, UNK, bpe_tokenizer, sentencepiece_files, wordlevel_tokenizer
from support.refusals import refuses

from raycv.config.schema import PromptConfig
from raycv.data.prompt_encoder import (
    EncodedPairs,
    PromptEncoder,
    encode_dataset,
    encoding_summary,
    encoding_warnings,
    prompt_encoder,
)
from raycv.data.prompt_template import GAP, render
from raycv.data.types import Criterion, Dataset, Pair

MODES = ["head_tail", "head", "tail", "none", "sliding"]
FITTING = ["head_tail", "head", "tail", "sliding"]
CRITERIA = {"A.1": "Mood is low, {or} sad", "A.2": "Sleeps badly", "A.3": "Is worn out: little strength for anything"}
QUESTION = " Does the post match the criterion description? Output yes or no"

TOKENIZERS = ["bpe_fast", "llama_fast", "llama_slow"]


@cache
def tokenizer(kind: str) -> Any:
    """A real tokenizer: puts <s> first and, as Llama's, has no pad token of its own, so that <unk> pads (id 0)."""
    if kind == "bpe_fast":
        made = bpe_tokenizer()
    else:
        from transformers import LlamaTokenizer, LlamaTokenizerFast

        with TemporaryDirectory() as folder:
            files = sentencepiece_files(Path(folder) / "llama")
            made = (LlamaTokenizerFast if kind == "llama_fast" else LlamaTokenizer).from_pretrained(files)
    assert made.is_fast == (kind != "llama_slow")
    assert made.pad_token is None
    made.padding_side = made.truncation_side = "right"
    made.pad_token = UNK
    return made


def encoder(
    mode: str = "head_tail",
    max_length: int = 96,
    kind: str = "bpe_fast",
    criteria: dict[str, str] = CRITERIA,
    head: float = 0.25,
    stride: float = 0.5,
) -> PromptEncoder:
    prompt = PromptConfig(max_length=max_length, long_post=mode, head_fraction=head, stride_fraction=stride)
    return prompt_encoder(tokenizer(kind), prompt, criteria.values())


def tokens_of(text: str, kind: str = "bpe_fast") -> list[int]:
    """Independent of the encoder."""
    return tokenizer(kind)(text, verbose=False)["input_ids"]


def least_length(kind: str = "bpe_fast", criteria: dict[str, str] = CRITERIA) -> int:
    """Tokens of the longest prompt with an empty post."""
    return max(len(tokens_of(render("", text), kind)) for text in criteria.values())


def dataset(posts: dict[str, str], criteria: dict[str, str] = CRITERIA) -> Dataset:
    pairs = [Pair(p, c, int((i + j) % 3 == 0)) for i, p in enumerate(sorted(posts)) for j, c in enumerate(criteria)]
    return Dataset(posts, {name: Criterion(name, text) for name, text in criteria.items()}, pairs)


def decoded(ids: Any, kind: str = "bpe_fast") -> str:
    return str(tokenizer(kind).decode(ids, clean_up_tokenization_spaces=False))


def prompts_of(encoded: EncodedPairs, kind: str = "bpe_fast") -> list[str]:
    rows = zip(encoded.input_ids, encoded.lengths, strict=True)
    return [decoded(ids[:length], kind) for ids, length in rows]


def numbered(words: int, mark: str = "") -> str:
    """A post whose every word occurs once, so that a piece of it has one place."""
    return " ".join(f"{mark}{word:04}" for word in range(words))


SHORT = "I am tired {all} the time, criterion: none 😀"
LONG = numbered(120, "w")
POSTS = {"p0": SHORT, "p1": LONG, "p2": "I cannot sleep. " * 30 + "end", "p3": "x" * 700, "p4": "é馬😀" * 60, "p5": ""}


# --- All modes, real tokenizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("mode", FITTING)
def test_after_fitting_the_tokenizer_cuts_nothing_and_question_and_criterion_are_there(mode: str, kind: str) -> None:
    data = dataset(POSTS)
    fitting = encoder(mode, 96, kind)
    encoded, facts = encode_dataset(fitting, data)

    assert facts["prompts_cut_by_tokenizer"] == 0
    assert encoding_warnings(facts) == []
    # Windows together hold all of a post.
    assert (facts["posts_shortened"], facts["posts_in_windows"]) == ((0, 4) if mode == "sliding" else (4, 0))
    assert ("in several windows" if mode == "sliding" else f"shortened ({mode})") in encoding_summary(facts, 9)
    whole = {post_id for post_id, post in data.posts.items() if fitting.fit(post).texts == [post]}
    assert 0 < len(whole) < len(POSTS)
    expected = [mode != "sliding" and pair.post_id not in whole for pair in data.pairs]
    assert encoded.shortened.tolist() == expected
    fitted = {post_id: fitting.fit(post).texts for post_id, post in data.posts.items()}
    texts = [text for pair in data.pairs for text in fitted[pair.post_id]]
    for row, (pair_index, text, prompt) in enumerate(
        zip(encoded.pair_of_row, texts, prompts_of(encoded, kind), strict=True)
    ):
        criterion = CRITERIA[data.pairs[pair_index].criterion_id]
        assert prompt.endswith(f", criterion: {criterion}{QUESTION}")
        # Nothing was cut: the row is the whole prompt, and the literal call of FR-002 gives the same.
        whole = render(text, criterion)
        assert encoded.input_ids[row, : encoded.lengths[row]].tolist() == tokens_of(whole, kind)
        literal = tokenizer(kind)(whole, max_length=96, truncation="longest_first", padding="max_length")
        assert encoded.input_ids[row].tolist() == literal["input_ids"]
    assert any(encoded.lengths > 90)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_are_padded_on_the_right_to_max_length(mode: str, kind: str) -> None:
    data = dataset(POSTS)
    encoded, facts = encode_dataset(encoder(mode, 96, kind), data)

    assert encoded.input_ids.shape == (len(encoded.lengths), 96)
    assert encoded.input_ids.dtype == encoded.lengths.dtype == encoded.pair_of_row.dtype == np.int32
    assert encoded.labels.dtype == np.int64
    assert encoded.labels.tolist() == [pair.label for pair in data.pairs]
    assert encoded.pad_id == tokenizer(kind).unk_token_id == 0
    bos = tokenizer(kind).convert_tokens_to_ids(BOS)
    for ids, length in zip(encoded.input_ids, encoded.lengths, strict=True):
        assert ids[0] == bos
        assert (ids[length:] == encoded.pad_id).all()
        assert ids[length - 1] != encoded.pad_id
    assert 1 <= encoded.lengths.min() < 60
    assert encoded.lengths.max() == facts["prompt_tokens_max"] <= 96
    assert facts["prompt_tokens_mean"] == pytest.approx(encoded.lengths.mean())


@pytest.mark.parametrize("mode", MODES)
def test_short_posts_enter_word_for_word(mode: str) -> None:
    posts = {"p0": "{post}, criterion: a 😀\n\tשלום", "p1": "", "p2": "  spaces  "}
    encoded, facts = encode_dataset(encoder(mode, 160), dataset(posts))
    expected = [f"{BOS}{render(post, criterion)}" for post in posts.values() for criterion in CRITERIA.values()]
    assert prompts_of(encoded) == expected
    assert (facts["posts_shortened"], facts["tokens_removed_mean"], facts["tokens_removed_max"]) == (0, 0.0, 0)
    assert facts["prompts"] == len(expected)
    assert encoding_warnings(facts) == []


@pytest.mark.parametrize("mode", FITTING)
def test_all_criteria_see_the_same_text_of_a_post(mode: str) -> None:
    data = dataset(POSTS)
    encoded, _ = encode_dataset(encoder(mode), data)
    seen: dict[str, set[tuple[str, ...]]] = {}
    for index, pair in enumerate(data.pairs):
        rows = [prompt for prompt, at in zip(prompts_of(encoded), encoded.pair_of_row, strict=True) if at == index]
        end = f", criterion: {CRITERIA[pair.criterion_id]}{QUESTION}"
        posts = tuple(prompt.removeprefix(f"{BOS}post: ").removesuffix(end) for prompt in rows)
        seen.setdefault(pair.post_id, set()).add(posts)
    assert {post_id: len(texts) for post_id, texts in seen.items()} == dict.fromkeys(POSTS, 1)


def test_pairs_of_a_long_post_differ() -> None:
    """What the fitting is for: under `none` the pairs of a long post become one input with different labels."""
    data = dataset({"p1": LONG})
    inputs = {mode: encode_dataset(encoder(mode), data)[0].input_ids for mode in ("head_tail", "none")}
    assert len(np.unique(inputs["head_tail"], axis=0)) == 3
    assert len(np.unique(inputs["none"], axis=0)) == 1


# --- Each mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_head_tail_keeps_the_configured_fractions(fraction: float, kind: str) -> None:
    # One sort of letter a side, so that pieces are alike for the slow tokenizer too, which cuts between characters.
    post = "abcdefgh" * 60
    (text,) = encoder("head_tail", 160, kind, head=fraction).fit(post).texts
    head, tail = text.split(GAP)
    assert post.startswith(head)
    assert post.endswith(tail)

    def size(part: str) -> int:
        return len(tokenizer(kind)(part, add_special_tokens=False)["input_ids"]) if part else 0

    kept = size(head) + size(tail)
    assert kept > 60
    assert abs(size(head) - fraction * kept) <= 3


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_head_and_tail_keep_their_end_and_use_the_room(kind: str) -> None:
    for mode, whole in (("head", LONG.startswith), ("tail", LONG.endswith)):
        fitting = encoder(mode, 96, kind)
        fitted = fitting.fit(LONG)
        (text,) = fitted.texts
        assert whole(text)
        assert GAP not in text
        assert fitting.rules.post_limit - 4 <= fitted.kept <= fitting.rules.post_limit
        assert fitted.kept == len(tokens_of(render(text, ""), kind))
        assert fitted.tokens == len(tokens_of(render(LONG, ""), kind))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_none_is_the_literal_right_cut(kind: str) -> None:
    data = dataset(POSTS)
    encoded, facts = encode_dataset(encoder("none", 96, kind), data)
    whole = [tokens_of(render(data.posts[p.post_id], CRITERIA[p.criterion_id]), kind) for p in data.pairs]
    for ids, length, expected in zip(encoded.input_ids, encoded.lengths, whole, strict=True):
        assert ids[:length].tolist() == expected[:96]
    assert facts["prompts_cut_by_tokenizer"] == sum(len(ids) > 96 for ids in whole) == 12
    assert encoded.shortened.tolist() == [len(ids) > 96 for ids in whole]
    assert facts["posts_shortened"] == 0
    assert f"12 of {len(whole)} cut on the right" in encoding_summary(facts, len(POSTS))


@pytest.mark.parametrize("max_length", [40, 60, 61, 62, 64, 66, 68, 80, 120])
def test_losses_of_the_right_cut_are_counted(max_length: int) -> None:
    posts = {f"p{n}": "a b" * n for n in range(0, 60, 3)}
    data = dataset(posts)
    _, facts = encode_dataset(encoder("none", max_length), data)

    question = criterion = 0
    for pair in data.pairs:
        before = f"post: {posts[pair.post_id]}, criterion:"
        whole = tokenizer("bpe_fast")(
            render(posts[pair.post_id], CRITERIA[pair.criterion_id]), return_offsets_mapping=True
        )
        kept = max(end for _, end in whole["offset_mapping"][:max_length])
        question += len(whole["input_ids"]) > max_length
        criterion += kept <= len(before)
    assert (facts["prompts_without_question"], facts["prompts_without_criterion"]) == (question, criterion)
    warnings = encoding_warnings(facts)
    assert len(warnings) == (question > 0)
    if question:
        assert f"{question} of {len(data.pairs)} prompts lost the question" in warnings[0]
        assert f"{criterion} of them the whole criterion" in warnings[0]
        assert "prompt.long_post=head_tail keeps both" in warnings[0]


def test_the_right_cut_loses_something_in_these_tests() -> None:
    posts = {"p0": "a b" * 60}
    _, facts = encode_dataset(encoder("none", 60), dataset(posts))
    assert (facts["prompts_without_question"], facts["prompts_without_criterion"]) == (3, 3)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("stride", [1.0, 0.5, 0.2])
def test_sliding_windows_cover_every_character(stride: float, kind: str) -> None:
    post = numbered(90, "😀é")
    fitting = encoder("sliding", 110, kind, stride=stride)
    fitted = fitting.fit(post)
    starts = [post.index(text) for text in fitted.texts]
    ends = [start + len(text) for start, text in zip(starts, fitted.texts, strict=True)]

    assert len(starts) > 3
    assert starts[0] == 0
    assert ends[-1] == len(post)
    assert starts == sorted(set(starts))
    assert all(post[end:start].strip() == "" for end, start in zip(ends, starts[1:], strict=False))
    lengths = [len(tokens_of(render(text, ""), kind)) for text in fitted.texts]
    assert max(lengths) == fitted.kept <= fitting.rules.post_limit
    if kind == "bpe_fast":
        assert all(end >= start for end, start in zip(ends, starts[1:], strict=False))
    steps = np.diff(starts) / (np.array(ends) - np.array(starts))[:-1]
    np.testing.assert_allclose(steps, stride, atol=0.15)


def test_rows_of_sliding_pairs() -> None:
    data = dataset(POSTS)
    fitting = encoder("sliding", 110)
    encoded, facts = encode_dataset(fitting, data)
    windows = {post_id: len(fitting.fit(post).texts) for post_id, post in POSTS.items()}

    assert windows["p0"] == windows["p5"] == 1
    assert min(windows["p1"], windows["p2"], windows["p3"], windows["p4"]) > 1
    expected = [index for index, pair in enumerate(data.pairs) for _ in range(windows[pair.post_id])]
    assert encoded.pair_of_row.tolist() == expected
    assert facts["prompts"] == len(expected) == len(encoded.input_ids)
    wanted = np.array([4, 0, 17, 3])
    by_hand = [row for pair in wanted for row, at in enumerate(expected) if at == pair]
    assert encoded.rows_of(wanted).tolist() == by_hand
    everything = encoded.rows_of(np.arange(len(data.pairs)))
    assert everything.tolist() == list(range(len(expected)))
    assert encoded.rows_of(np.array([0, 15])).tolist() == [0, len(expected) - 3]


def test_rows_are_pairs_in_the_other_modes() -> None:
    encoded, _ = encode_dataset(encoder("head_tail"), dataset(POSTS))
    assert encoded.pair_of_row.tolist() == list(range(18))
    assert encoded.rows_of(np.array([5, 2, 11])).tolist() == [5, 2, 11]


def test_statistics_are_counts_of_what_was_shortened() -> None:
    data = dataset({"p0": SHORT, "p1": LONG, "p2": LONG[:-5]})
    fitting = encoder("head", 96)
    _, facts = encode_dataset(fitting, data)
    removed = [len(tokens_of(render(post, ""))) - fitting.fit(post).kept for post in (LONG, LONG[:-5])]
    assert facts["posts_shortened"] == 2
    assert facts["tokens_removed_mean"] == pytest.approx(np.mean(removed))
    assert facts["tokens_removed_max"] == max(removed)
    assert (facts["long_post"], facts["max_length"], facts["prompts"]) == ("head", 96, 9)
    longest = max(len(tokens_of(render("", text))) for text in CRITERIA.values())
    assert facts["post_limit_tokens"] == 96 - longest + len(tokens_of(render("", "")))
    assert "w0001" not in str(facts)


# --- Narrow budgets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FITTING)
def test_criterion_that_leaves_no_room_is_refused_with_its_tokens(mode: str) -> None:
    needed = least_length()
    with refuses(
        "prompt-length", f"prompt.max_length={needed}: ", f"{needed} tokens", "raise prompt.max_length"
    ) as caught:
        encoder(mode, needed)
    assert "Mood" not in str(caught.value)
    encoder(mode, needed + 1)


def test_none_takes_any_budget() -> None:
    encoded, _ = encode_dataset(encoder("none", 16), dataset(POSTS))
    assert encoded.lengths.tolist() == [16] * 18


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("mode", ["head_tail", "head", "tail"])
def test_narrowest_budgets_still_keep_the_question(mode: str, kind: str) -> None:
    """One token for the post, then two, ...: the prompt is never cut on the right (the gap itself takes some)."""
    data = dataset({"p1": LONG})
    cut = {}
    for room in range(1, 9):
        _, facts = encode_dataset(encoder(mode, least_length(kind) + room, kind), data)
        cut[room] = facts["prompts_cut_by_tokenizer"]
    assert cut == dict.fromkeys(range(1, 9), 0)


# --- Any text --------------------------------------------------------------------------------------------------------

ANY_POST = st.one_of(
    st.text(max_size=150),
    st.text(st.sampled_from("aé😀👩\u200d👧 \n\t\u200fשלום\u202e\u0301馬<>/s"), max_size=250),
    st.text(st.sampled_from(" \n\t\u00a0\u2003"), max_size=60),
    st.integers(1, 900).map(lambda n: "a" * n),
    st.integers(1, 120).map(lambda n: "😀" * n),
    st.lists(st.sampled_from([BOS, "</s>", UNK, " ", "{post}", ", criterion:"]), max_size=40).map("".join),
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", TOKENIZERS)
@given(post=ANY_POST, room=st.integers(12, 60), head=st.floats(0, 1), stride=st.floats(0.2, 1))
@example(post="", room=12, head=0.25, stride=0.5)
@example(post="   ", room=12, head=0.25, stride=0.5)
@example(post="y" * 900, room=12, head=0.25, stride=0.5)
@example(post="👩‍👧" * 60, room=12, head=0.5, stride=1.0)
@example(post="שלום עולם " * 30, room=12, head=1.0, stride=1.0)
@example(post="\n\u2003" * 90 + "so tired" + " \u00a0" * 90, room=12, head=1.0, stride=1.0)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_post_fits(mode: str, kind: str, post: str, room: int, head: float, stride: float) -> None:
    assume(post.strip() or len(post) < 4)  # a blank post never comes here: it is dropped with the data
    max_length = least_length(kind) + room
    encoded, facts = encode_dataset(encoder(mode, max_length, kind, head=head, stride=stride), dataset({"p": post}))

    assert encoded.input_ids.shape[1] == max_length
    assert encoded.lengths.max() <= max_length
    assert encoded.pair_of_row[0] == 0
    assert encoded.pair_of_row[-1] == 2
    if mode == "none":
        return
    assert facts["prompts_cut_by_tokenizer"] == 0
    ends = {f", criterion: {CRITERIA['A.1']}{QUESTION}", f", criterion: {CRITERIA['A.3']}{QUESTION}"}
    for row in (0, -1):
        prompt = decoded(encoded.input_ids[row, : encoded.lengths[row]], kind)
        assert any(prompt.endswith(end) for end in ends)


# --- Posts that spell tokens ------------------------------------------------------------------------------------------

SPELLING = [*TOKENIZERS, "unigram_fast", "unigram_slow"]


@cache
def unigram(kind: str) -> Any:
    """XLM-RoBERTa's: its model holds </s> as a word, and its normalisation turns wide characters into narrow ones."""
    import io

    import sentencepiece
    from transformers import XLMRobertaTokenizer, XLMRobertaTokenizerFast

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES, "<s> </s> ＜／"] * 20),
        model_writer=model,
        vocab_size=120,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sentencepiece.bpe.model"
        path.write_bytes(model.getvalue())
        return (XLMRobertaTokenizerFast if kind == "unigram_fast" else XLMRobertaTokenizer)(str(path))


def spelling_encoder(kind: str, rows: int | None = None) -> PromptEncoder:
    made = unigram(kind) if kind.startswith("unigram") else tokenizer(kind)
    prompt = PromptConfig(max_length=200, long_post="head_tail", head_fraction=0.25, stride_fraction=0.5)
    return prompt_encoder(made, prompt, CRITERIA.values(), rows)


@pytest.mark.parametrize("kind", SPELLING)
def test_a_text_that_spells_special_tokens_stays_text(kind: str) -> None:
    """An encoder-decoder would pool at such a token, or refuse rows with unequal numbers of them."""
    encoding = spelling_encoder(kind)
    posts = {"p0": "I cannot sleep", "p1": "<s>I cannot</s> sleep</s>", "p2": "</s>" * 90, "p3": "a < b </ s> <unk>"}
    asked = CRITERIA | {"A.2": "Sleeps </s> badly"}
    encoded, facts = encode_dataset(encoding, dataset(posts, asked))
    special = set(encoding.tokenizer.all_special_ids) - {encoding.tokenizer.unk_token_id}
    rows = zip(encoded.input_ids.tolist(), encoded.lengths, strict=True)
    assert len({sum(i in special for i in ids[:length]) for ids, length in rows}) == 1
    assert facts["posts_spelling_special_tokens"] == 3
    assert encoding_warnings(facts) == [
        "3 posts spelt special tokens of the base model, such as </s>: a space within each keeps it text"
    ]
    assert encoding.as_text(posts["p0"]) == posts["p0"]
    assert encoding.as_text(posts["p1"]) == "< s>I cannot< /s> sleep< /s>"


def test_what_still_becomes_a_special_token_is_refused_with_ids_and_without_text() -> None:
    posts = {"p0": "fine", "p1": "my secret ＜/s＞", "p2": "fine too"}
    with refuses("data-text", "1 fault\n", "post 'p1': ", "</s>") as caught:
        encode_dataset(spelling_encoder("unigram_fast"), dataset(posts))
    assert "secret" not in str(caught.value)
    with refuses("data-text", "criterion with the question", "</s>"):
        prompt_encoder(unigram("unigram_fast"), PromptConfig(
            max_length=200, long_post="none", head_fraction=0.25, stride_fraction=0.5
        ), ["＜/s＞"])  # fmt: skip


def test_tokens_without_an_embedding_are_refused_with_the_ids_of_the_posts() -> None:
    made = wordlevel_tokenizer([*render("", "").split(), "secret", "unheard"])
    made.pad_token = UNK
    posts = {"p0": "plain", "p1": "secret , unheard , ", "p2": "secret", "p3": "unheard , "}
    prompt = PromptConfig(max_length=200, long_post="head_tail", head_fraction=0.25, stride_fraction=0.5)
    rows = len(made) - 1
    with refuses(
        "data-text", ": 2 faults\n", "post 'p1': ", "post 'p3': ", f"token {rows}, ", f" {rows - 1} "
    ) as caught:
        encode_dataset(prompt_encoder(made, prompt, CRITERIA.values(), rows), dataset(posts))
    assert "secret" not in str(caught.value)
    assert "unheard" not in str(caught.value)


def test_an_added_token_without_an_embedding_stays_text() -> None:
    made = bpe_tokenizer()
    rows = len(made)
    made.add_tokens(["<extra>"])
    made.pad_token = UNK
    prompt = PromptConfig(max_length=200, long_post="head_tail", head_fraction=0.25, stride_fraction=0.5)
    assert max(made("<extra>")["input_ids"]) == rows
    encoded, facts = encode_dataset(prompt_encoder(made, prompt, CRITERIA.values(), rows), dataset({"p": "<extra>"}))
    assert encoded.input_ids.max() < rows
    assert facts["posts_spelling_special_tokens"] == 1
