"""Holds the text of the prompt, and fills it with a post and a criterion; shortens a post to the budget of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from raycv.errors import UserError

TEMPLATE = "post: {post}, criterion: {criterion} Does the post match the criterion description? Output yes or no"
GAP = " ... "
"""Replaces the middle of a post that `head_tail` removed."""

LongPost = Literal["head_tail", "head", "tail", "none", "sliding"]
Spans = Sequence[tuple[int, int]]


def render(post: str, criterion: str) -> str:
    """The exact prompt of FR-002."""
    return TEMPLATE.format(post=post, criterion=criterion)


@dataclass(frozen=True)
class PromptRules:
    """The rules by which a post becomes prompts. The checkpoint holds them, so that training and inference agree."""

    long_post: LongPost
    max_length: int
    """Tokens of a prompt, special tokens included."""
    head_fraction: float
    stride_fraction: float
    post_limit: int
    """Most tokens of `render(post, "")`: `max_length` less the tokens of the longest criterion of the run.

    All criteria share the limit, so that all prompts of a post hold the same post text.
    """


@dataclass(frozen=True)
class FittedPost:
    """A post shortened for the prompt: one text, or for `sliding` one per window."""

    texts: list[str]
    tokens: int
    """Tokens of `render(post, "")` before the post is shortened."""
    kept: int
    """The same afterwards; for `sliding` those of the widest window."""

    @property
    def shortened(self) -> bool:
        return self.kept < self.tokens


def fit_post(post: str, rules: PromptRules, count: Callable[[str], int], spans: Callable[[str], Spans]) -> FittedPost:
    """Shortens `post` to `rules.post_limit`, unless `rules.long_post` is `none`.

    Args:
        post: The text of the post.
        rules: The limit and the way to shorten.
        count: Gives the number of tokens of a prompt, special tokens included.
        spans: Gives the pieces of a text as (start, end) positions of characters. The post may be cut at their borders.
            They are tokens if the tokenizer knows their positions, else characters.

    Raises:
        UserError: An empty post does not fit, or no word of the post does.
    """

    def fits(text: str) -> bool:
        return count(render(text, "")) <= rules.post_limit

    tokens = count(render(post, ""))
    if rules.long_post == "none" or tokens <= rules.post_limit:
        return FittedPost([post], tokens, tokens)
    if not fits(""):
        raise UserError(
            f"prompt.max_length={rules.max_length} leaves no room for a post beside the longest criterion.",
            kind="prompt-length",
            remedies=["raise prompt.max_length", "shorten the criteria"],
        )
    # White space at the ends would take the room of words, or all of it, so we remove it.
    post = post.strip()
    pieces = spans(post)
    if rules.long_post == "sliding":
        texts = _windows(post, pieces, fits, rules.stride_fraction)
    else:
        texts = [_cut(post, pieces, rules, fits)]
    return FittedPost(texts, tokens, max(count(render(text, "")) for text in texts))


def _cut(post: str, pieces: Spans, rules: PromptRules, fits: Callable[[str], bool]) -> str:
    """As much of the post as fits; only its head if the gap leaves no room for text.

    Raises:
        UserError: No word fits.
    """
    for cut in (partial(_kept, post, pieces, rules), partial(_run, post, pieces, 0)):
        text = cut(_most(cut, fits, len(pieces)))
        if text.strip():
            return text
    raise UserError(
        f"prompt.max_length={rules.max_length} leaves room for no word of a post beside the longest criterion.",
        kind="prompt-length",
        remedies=["raise prompt.max_length", "shorten the criteria"],
    )


def _most(cut: Callable[[int], str], fits: Callable[[str], bool], pieces: int) -> int:
    """The largest n for which `cut(n)` fits, found by doubling, then by bisection; 0 if one piece does not fit."""
    low, high = 0, 1
    while high < pieces and fits(cut(high)):
        low, high = high, 2 * high
    high = min(high, pieces)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(cut(middle)) else (low, middle - 1)
    return low


def _kept(post: str, pieces: Spans, rules: PromptRules, n: int) -> str:
    if n >= len(pieces):
        return post
    head = {"head": n, "tail": 0}.get(rules.long_post, round(n * rules.head_fraction))
    tail = n - head
    start = post[: pieces[head - 1][1]] if head else ""
    end = post[pieces[-tail][0] :] if tail else ""
    if not n:
        return ""
    if rules.long_post == "head_tail":
        return f"{start.rstrip()}{GAP}{end.lstrip()}"
    return start or end


def _run(post: str, pieces: Spans, start: int, n: int) -> str:
    """The text of `n` pieces from piece `start`."""
    return post[pieces[start][0] : pieces[start + n - 1][1]] if n else ""


def _windows(post: str, pieces: Spans, fits: Callable[[str], bool], stride_fraction: float) -> list[str]:
    """The windows that together cover every piece, each as long as fits. They overlap if `stride_fraction` is below 1.

    Raises:
        UserError: A single piece does not fit.
    """
    texts, start = [], 0
    while True:
        cut = partial(_run, post, pieces, start)
        taken = _most(cut, fits, len(pieces) - start)
        if not taken:
            raise UserError(
                "A single piece of a post does not fit into a sliding window.",
                kind="prompt-length",
                remedies=["raise prompt.max_length"],
            )
        texts.append(cut(taken))
        if start + taken == len(pieces):
            return texts
        start += max(1, int(taken * stride_fraction))
