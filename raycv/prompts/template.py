"""(post, criterion) to prompt: the template, and the post shortened to fit the budget of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from raycv.errors import UserError

TEMPLATE = "post: {post}, criterion: {criterion} Does the post match the criterion description? Output yes or no"
GAP = " ... "
"""Stands where the middle of a post was left out."""

LongPost = Literal["head_tail", "head", "tail", "none", "sliding"]
Spans = Sequence[tuple[int, int]]


def render(post: str, criterion: str) -> str:
    """The exact prompt of FR-002."""
    return TEMPLATE.format(post=post, criterion=criterion)


@dataclass(frozen=True)
class PromptRules:
    """How a post becomes prompts; kept in the checkpoint, so that training and inference cannot drift apart."""

    long_post: LongPost
    max_length: int
    """tokens, special tokens included"""
    head_fraction: float
    stride_fraction: float
    post_limit: int
    """Most tokens of `render(post, "")`: what `max_length` leaves after the longest criterion of the run.

    One limit for all criteria, so that all prompts of a post hold the same post text.
    """


@dataclass(frozen=True)
class FittedPost:
    """A post as it enters the prompt: one text, or one a window for `sliding`."""

    texts: list[str]
    tokens: int
    """tokens of `render(post, "")` before fitting"""
    kept: int
    """the same after fitting (the widest window for `sliding`)"""

    @property
    def shortened(self) -> bool:
        return self.kept < self.tokens


def fit_post(post: str, rules: PromptRules, count: Callable[[str], int], spans: Callable[[str], Spans]) -> FittedPost:
    """Fits `post` to `rules.post_limit`.

    `count`: tokens of a prompt, special tokens included. `spans`: the pieces, as (start, end) character positions, at
    whose borders the post may be cut: tokens where the tokenizer knows their positions, else characters.
    Raises: UserError if not even an empty post fits.
    """

    def fits(text: str) -> bool:
        return count(render(text, "")) <= rules.post_limit

    tokens = count(render(post, ""))
    if rules.long_post == "none" or tokens <= rules.post_limit:
        return FittedPost([post], tokens, tokens)
    if not fits(""):
        raise UserError(
            f"prompt.max_length={rules.max_length} leaves no room for a post beside the longest criterion.",
            remedies=["raise prompt.max_length", "shorten the criteria"],
        )
    # White space at its ends would take the room of words, or all of it.
    post = post.strip()
    pieces = spans(post)
    if rules.long_post == "sliding":
        texts = _windows(post, pieces, fits, rules.stride_fraction)
    else:
        texts = [_cut(post, pieces, rules, fits)]
    return FittedPost(texts, tokens, max(count(render(text, "")) for text in texts))


def _cut(post: str, pieces: Spans, rules: PromptRules, fits: Callable[[str], bool]) -> str:
    """As much of the post as fits. Where the gap between head and tail leaves no room for either, the head alone."""
    for cut in (partial(_kept, post, pieces, rules), partial(_run, post, pieces, 0)):
        text = cut(_most(cut, fits, len(pieces)))
        if text.strip():
            return text
    raise UserError(
        f"prompt.max_length={rules.max_length} leaves room for no word of a post beside the longest criterion.",
        remedies=["raise prompt.max_length", "shorten the criteria"],
    )


def _most(cut: Callable[[int], str], fits: Callable[[str], bool], pieces: int) -> int:
    """The most pieces n of which `cut(n)` fits, 0 if none does: found by doubling, then by bisection."""
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
    """The text of `n` pieces from `start` on."""
    return post[pieces[start][0] : pieces[start + n - 1][1]] if n else ""


def _windows(post: str, pieces: Spans, fits: Callable[[str], bool], stride_fraction: float) -> list[str]:
    """Overlapping windows that cover every piece, each as long as fits."""
    texts, start = [], 0
    while True:
        cut = partial(_run, post, pieces, start)
        taken = _most(cut, fits, len(pieces) - start)
        if not taken:
            raise UserError(
                "A single piece of a post does not fit into a sliding window.", remedies=["raise prompt.max_length"]
            )
        texts.append(cut(taken))
        if start + taken == len(pieces):
            return texts
        start += max(1, int(taken * stride_fraction))
