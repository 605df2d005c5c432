"""The prompt string of FR-002, and how a post is fitted to its budget, with a tokenizer that counts words."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import refuses

from raycv.data.prompt_template import GAP, FittedPost, PromptRules, Spans, fit_post, render
from raycv.errors import UserError

TEMPLATE_WORDS = 17
"""of `render("", "")`, punctuation marks included; a post of n words has n more"""
WORD = r"\.\.\.|\w+|[^\w\s]"


def count(prompt: str) -> int:
    return len(re.findall(WORD, prompt))


def spans(text: str) -> Spans:
    return [match.span() for match in re.finditer(rf"({WORD})\s*", text)]


def rules(room: int, long_post: str = "head_tail", head: float = 0.25, stride: float = 0.5) -> PromptRules:
    """Rules that leave `room` words for the post."""
    limit = TEMPLATE_WORDS + room
    return PromptRules(long_post, limit, head, stride, post_limit=limit)  # type: ignore[arg-type]


def words(n: int) -> str:
    return " ".join(f"w{i}" for i in range(n))


def fit(post: str, fitting: PromptRules) -> FittedPost:
    return fit_post(post, fitting, count, spans)


@pytest.mark.parametrize(
    ("post", "criterion"),
    [
        ("I cannot sleep", "Sleeps badly"),
        ("{post} {criterion} {0} {} {{}} %s $x", "{criterion}, {post}"),
        ('commas, "quotes", criterion: none, post: none', "a, b, and c"),
        ("línea\nuno\t\u200fשלום\u200e 😀👩‍👧 e\u0301 \x00", "žluťoučký kůň 馬"),
        ("", ""),
        ("  spaces kept  ", " "),
    ],
)
def test_prompt_is_that_of_the_specification(post: str, criterion: str) -> None:
    expected = "post: " + post + ", criterion: " + criterion
    expected += " Does the post match the criterion description? Output yes or no"
    assert render(post, criterion) == expected


def test_the_counting_that_these_tests_rest_on() -> None:
    assert count(render("", "")) == TEMPLATE_WORDS
    assert count(render(words(5), "")) == TEMPLATE_WORDS + 5
    assert count(render(f"w1{GAP}w2", "")) == TEMPLATE_WORDS + 3


@pytest.mark.parametrize("mode", ["head_tail", "head", "tail", "none", "sliding"])
def test_short_post_is_left_as_it_is(mode: str) -> None:
    post = "  a  short\tpost\n"
    fitted = fit(post, rules(5, mode))
    assert fitted == FittedPost([post], tokens=TEMPLATE_WORDS + 3, kept=TEMPLATE_WORDS + 3)
    assert not fitted.shortened
    exact = words(5)
    assert fit(exact, rules(5, mode)).texts == [exact]


def test_head_tail_keeps_the_configured_shares_around_the_gap() -> None:
    fitted = fit(words(100), rules(room=13))
    # 13 words fit, one of them is the gap: 3 of 12 from the head
    assert fitted.texts == ["w0 w1 w2 ... " + " ".join(f"w{i}" for i in range(91, 100))]
    assert (fitted.tokens, fitted.kept) == (TEMPLATE_WORDS + 100, TEMPLATE_WORDS + 13)
    assert fitted.shortened


@pytest.mark.parametrize(("fraction", "head", "tail"), [(0.0, 0, 12), (0.5, 6, 6), (0.75, 9, 3), (1.0, 12, 0)])
def test_head_fraction(fraction: float, head: int, tail: int) -> None:
    (text,) = fit(words(100), rules(13, head=fraction)).texts
    start, end = text.split(GAP)
    assert start == " ".join(f"w{i}" for i in range(head))
    assert end == " ".join(f"w{i}" for i in range(100 - tail, 100))


def test_head_and_tail() -> None:
    post = words(50)
    assert [text.strip() for text in fit(post, rules(10, "head")).texts] == [words(10)]
    assert fit(post, rules(10, "tail")).texts == [" ".join(f"w{i}" for i in range(40, 50))]


def test_none_leaves_the_cut_to_the_tokenizer() -> None:
    fitted = fit(words(50), rules(9, "none"))
    assert fitted.texts == [words(50)]
    assert not fitted.shortened


@pytest.mark.parametrize(("stride", "starts"), [(1.0, [0, 10, 20]), (0.5, [0, 5, 10, 15]), (0.1, list(range(16)))])
def test_sliding_windows_step_by_the_stride_and_cover_the_post(stride: float, starts: list[int]) -> None:
    fitted = fit(words(25), rules(10, "sliding", stride=stride))
    windows = [text.split() for text in fitted.texts]
    assert [int(window[0][1:]) for window in windows] == starts
    for start, window in zip(starts, windows, strict=True):
        assert window == words(25).split()[start : start + 10]
    assert fitted.kept == TEMPLATE_WORDS + 10


@pytest.mark.timeout(20)
def test_window_never_stands_still() -> None:
    """A stride that rounds to nothing still steps by a word."""
    fitted = fit(words(6), rules(2, "sliding", stride=0.01))
    assert [text.split()[0] for text in fitted.texts] == ["w0", "w1", "w2", "w3", "w4"]


@pytest.mark.parametrize("mode", ["head_tail", "head", "tail", "sliding"])
def test_no_room_for_a_post_is_refused(mode: str) -> None:
    with refuses("prompt-length", "prompt.max_length=10 ", "raise prompt.max_length", "shorten the criteria") as caught:
        fit(words(50), rules(10 - TEMPLATE_WORDS, mode))
    assert "w1" not in str(caught.value)


def test_piece_that_fits_no_window_is_refused() -> None:
    with refuses("prompt-length", "sliding window", "raise prompt.max_length"):
        fit_post("x" * 200, rules(100, "sliding"), len, lambda text: [(0, len(text))])


@pytest.mark.parametrize("room", range(1, len(GAP) + 3))
@pytest.mark.parametrize("mode", ["head_tail", "head", "tail", "sliding"])
def test_room_for_less_than_the_gap(mode: str, room: int) -> None:
    """Characters as tokens: even where the gap alone is too long, the prompt fits, or the run is refused."""
    limit = len(render("", "")) + room
    narrow = PromptRules(mode, limit, 0.5, 0.5, post_limit=limit)  # type: ignore[arg-type]
    try:
        fitted = fit_post("abcdefghijklmnop", narrow, len, lambda text: [(i, i + 1) for i in range(len(text))])
    except UserError:
        return
    assert all(len(render(text, "")) <= limit for text in fitted.texts)


@given(
    post=st.text(st.sampled_from("ab \n😀,."), max_size=200),
    room=st.integers(1, 12),
    mode=st.sampled_from(["head_tail", "head", "tail", "sliding"]),
    head=st.floats(0, 1),
    stride=st.floats(0.01, 1),
)
@settings(max_examples=100, deadline=None)
def test_fitted_post_fits_and_holds_nothing_but_the_post(
    post: str, room: int, mode: str, head: float, stride: float
) -> None:
    try:
        fitted = fit(post, rules(room, mode, head, stride))
    except UserError:
        # Refused rather than emptied: what fits is nothing, or white space.
        assert mode != "sliding"
        return
    assert fitted.kept == max(count(render(text, "")) for text in fitted.texts) <= TEMPLATE_WORDS + room
    if not fitted.shortened:
        assert fitted.texts == [post]
    elif mode == "head_tail" and GAP in fitted.texts[0]:
        start, end = fitted.texts[0].split(GAP)
        assert post.strip().startswith(start)
        assert post.strip().endswith(end)
    elif mode in ("head", "head_tail"):
        assert post.lstrip().startswith(fitted.texts[0].lstrip())
    elif mode == "tail":
        assert post.strip().endswith(fitted.texts[0])
    else:
        assert all(text in post for text in fitted.texts)
        assert post.strip().startswith(fitted.texts[0].strip())
        assert post.strip().endswith(fitted.texts[-1].strip())


@pytest.mark.parametrize("room", range(1, 12))
def test_a_tight_budget_never_empties_a_post(room: int) -> None:
    """Where the gap leaves no room for head or tail, the head alone is kept."""
    (text,) = fit(" ".join(f"w{i}" for i in range(50)), rules(room, "head_tail", 0.25, 0.5)).texts
    assert "w0" in text or "w49" in text


def test_windows_of_a_huge_post_take_time_in_proportion_to_its_length() -> None:
    """Counted in tokenizer calls on texts, whose lengths add up: not on the whole rest of the post for each window."""
    read = 0

    def counted(prompt: str) -> int:
        nonlocal read
        read += len(prompt)
        return count(prompt)

    def work(words: int) -> int:
        nonlocal read
        read = 0
        fit_post(" ".join(["word"] * words), rules(50, "sliding", 0.25, 0.5), counted, spans)
        return read

    assert work(8000) < 5 * work(2000)
