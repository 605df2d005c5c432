"""Encodes prompts as token arrays, and counts shortened posts."""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raycv.data.prompt_template import FittedPost, PromptRules, Spans, fit_post, render
from raycv.data.types import Dataset
from raycv.errors import FaultsError, UserError, counted

if TYPE_CHECKING:
    import numpy as np

    from raycv.config.schema import PromptConfig

REWRITE = ("write these characters of the text in another way, or leave them out",)


@dataclass(frozen=True)
class EncodedPairs:
    """Token arrays of P pairs in R rows. R = P except for `sliding`, which gives a pair a row per window."""

    input_ids: "np.ndarray"
    """int32 [R, max_length], padded on the right."""
    lengths: "np.ndarray"
    """int32 [R]: tokens before the padding."""
    pair_of_row: "np.ndarray"
    """int32 [R], ascending: index of the row's pair."""
    labels: "np.ndarray"
    """int64 [P]."""
    post_of_pair: "np.ndarray"
    """int32 [P]: number of the pair's post."""
    pad_id: int
    shortened: "np.ndarray | None" = None
    """bool [P]: a prompt of the pair lacks a part of its text. Windows that together hold the post lack nothing. None
    where nobody asks."""

    def group_of_row(self) -> "np.ndarray":
        """The group of each row, int64 [R]. Rows of a group hold the same window of a post under different criteria."""
        import numpy as np

        windows = np.bincount(self.pair_of_row)
        first = np.cumsum(windows) - windows
        window = np.arange(len(self.pair_of_row)) - first[self.pair_of_row]
        return self.post_of_pair[self.pair_of_row].astype(np.int64) * int(windows.max()) + window

    def rows_of(self, pairs: "np.ndarray") -> "np.ndarray":
        """The indices of the rows of `pairs` (indices [n]), in the order of `pairs`."""
        import numpy as np

        first = np.searchsorted(self.pair_of_row, pairs, side="left")
        last = np.searchsorted(self.pair_of_row, pairs, side="right")
        if (last - first == 1).all():
            return first
        return np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])


class UnreadableTextError(UserError):
    """A text whose tokens would not mean that text to the base model."""


class PromptEncoder:
    """Encodes texts with a tokenizer under one set of prompt rules. Training and inference share it.

    A text can spell a token of the tokenizer, such as `</s>`. Read as that token it would end the prompt there, or have
    no embedding. Such a text gets a space behind the token's first character, so it stays text in every family.
    """

    def __init__(self, tokenizer: Any, rules: PromptRules, rows: int | None = None) -> None:
        """Finds the tokens that no text may become.

        Args:
            tokenizer: The tokenizer of the base model.
            rules: The rules by which a post becomes prompts.
            rows: How many token ids have an embedding; None if the model sets no limit.
        """
        self.tokenizer = tokenizer
        self.rules = rules
        self._rows = rows
        added = tokenizer.added_tokens_decoder.items()
        special = {*tokenizer.all_special_tokens, *(str(token) for _, token in added if token.special)}
        beyond = {str(token) for token_id, token in added if rows is not None and token_id >= rows}
        marks = sorted((mark for mark in special | beyond if len(mark.strip()) > 1), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
        # Characters that the tokenizer does not know become its unknown token, so we allow that one.
        self._special = {*tokenizer.convert_tokens_to_ids(sorted(special))} - {tokenizer.unk_token_id}
        self._own = self._specials(self._ids(render("", "")))

    def with_limit(self, post_limit: int) -> "PromptEncoder":
        """The same encoder with another limit for the tokens of posts."""
        other = copy.copy(self)
        other.rules = replace(self.rules, post_limit=post_limit)
        return other

    def as_text(self, text: str) -> str:
        """`text` with a space within each token that it spells."""
        return self._marks.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def count(self, prompt: str) -> int:
        """The number of tokens of the uncut `prompt`, special tokens included.

        Raises:
            UnreadableTextError: `prompt` still becomes a special token, or a token without an embedding.
        """
        ids = self._ids(prompt)
        if self._rows is not None and max(ids, default=0) >= self._rows:
            raise UnreadableTextError(
                f"the text has token {max(ids)}, and the base model has embeddings for 0 to {self._rows - 1} only",
                kind="data-text",
                remedies=[*REWRITE, "choose a base model whose tokenizer belongs to it"],
            )
        if self._specials(ids) > self._own:
            spelt = Counter(i for i in ids if i in self._special) - Counter(self._ids(render("", "")))
            names = ", ".join(sorted(set(map(str, self.tokenizer.convert_ids_to_tokens(list(spelt))))))
            raise UnreadableTextError(
                f"the text spells {names}, which the tokenizer takes for its own special token",
                kind="data-text",
                remedies=REWRITE,
            )
        return len(ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(self.as_text(text), truncation=False, verbose=False)["input_ids"])

    def _specials(self, ids: Iterable[int]) -> int:
        return sum(map(self._special.__contains__, ids))

    def spans(self, text: str) -> Spans:
        """The pieces that a cut of `text` keeps whole: tokens if the tokenizer has their positions, else characters."""
        if not self.tokenizer.is_fast:
            return [(i, i + 1) for i in range(len(text))]
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [(start, end) for start, end in encoding["offset_mapping"] if end > start]

    def fit(self, post: str) -> FittedPost:
        """Shortens `post` for the prompts. Raises: UserError if no part of it fits, or it cannot be read as text."""
        return fit_post(self.as_text(post), self.rules, self.count, self.spans)

    def tokens(self, prompts: Sequence[str]) -> tuple["np.ndarray", "np.ndarray"]:
        """Calls the tokenizer exactly as FR-002 does.

        Returns:
            `input_ids`, int32 [n, max_length], and `lengths`, int32 [n].
        """
        import numpy as np

        batch = self.tokenizer(
            [self.as_text(prompt) for prompt in prompts],
            max_length=self.rules.max_length,
            truncation="longest_first",
            padding="max_length",
            verbose=False,
        )
        lengths = np.array([sum(mask) for mask in batch["attention_mask"]], dtype=np.int32)
        return np.array(batch["input_ids"], dtype=np.int32), lengths


def prompt_encoder(
    tokenizer: Any, prompt: "PromptConfig", criteria: Iterable[str], rows: int | None = None
) -> PromptEncoder:
    """Makes an encoder whose post limit leaves room for the longest of `criteria`. `rows`: as of `PromptEncoder`.

    Raises:
        UserError: A criterion and the question leave no room for a post within `prompt.max_length`, and
            `prompt.long_post` is not `none`. A criterion cannot be read as text.
    """
    rules = PromptRules(prompt.long_post, prompt.max_length, prompt.head_fraction, prompt.stride_fraction, 0)
    encoder = PromptEncoder(tokenizer, rules, rows)
    try:
        empty = encoder.count(render("", ""))
        reserved = max(encoder.count(render("", criterion)) for criterion in criteria) - empty
    except UnreadableTextError as error:
        raise UserError(
            f"The base model cannot read a criterion with the question: {error.what}.",
            kind=error.kinds,
            remedies=error.remedies,
        ) from error
    post_limit = prompt.max_length - reserved
    if prompt.long_post != "none" and post_limit <= empty:
        raise UserError(
            f"prompt.max_length={prompt.max_length}: the longest criterion and the question take "
            f"{reserved + empty} tokens, which leaves no room for a post.",
            kind="prompt-length",
            remedies=["raise prompt.max_length", "shorten the criteria", "prompt.long_post=none (cuts on the right)"],
        )
    return encoder.with_limit(post_limit)


def encode_dataset(encoder: PromptEncoder, dataset: Dataset) -> tuple[EncodedPairs, dict[str, Any]]:
    """All pairs of `dataset` as token arrays, and statistics of shortened posts (counts only, without text).

    Raises:
        FaultsError: The base model cannot read some posts as text.
        UserError: No part of a post fits the prompt.
    """
    import numpy as np

    fitted: dict[str, FittedPost] = {}
    unreadable: dict[str, UnreadableTextError] = {}
    for post_id, post in dataset.posts.items():
        try:
            fitted[post_id] = encoder.fit(post)
        except UnreadableTextError as error:
            unreadable[post_id] = error
    if unreadable:
        raise FaultsError(
            "The base model cannot read some posts",
            [f"post {post_id!r}: {error.what}" for post_id, error in unreadable.items()],
            kind="data-text",
            remedies=list(dict.fromkeys(remedy for error in unreadable.values() for remedy in error.remedies)),
        )
    number = {post_id: index for index, post_id in enumerate(dataset.posts)}
    prompts, pair_of_row = [], []
    for index, pair in enumerate(dataset.pairs):
        for text in fitted[pair.post_id].texts:
            prompts.append(render(text, dataset.criteria[pair.criterion_id].text))
            pair_of_row.append(index)
    input_ids, lengths = encoder.tokens(prompts)
    full = np.flatnonzero(lengths == encoder.rules.max_length).tolist()
    cut = [index for index in full if encoder.count(prompts[index]) > encoder.rules.max_length]
    # Windows together hold the whole post, so `sliding` shortens nothing.
    fits = [encoder.rules.long_post == "sliding" or not fitted[pair.post_id].shortened for pair in dataset.pairs]
    shortened = ~np.array(fits, dtype=bool)
    shortened[[pair_of_row[index] for index in cut]] = True
    encoded = EncodedPairs(
        input_ids=input_ids,
        lengths=lengths,
        pair_of_row=np.array(pair_of_row, dtype=np.int32),
        labels=np.array([pair.label for pair in dataset.pairs], dtype=np.int64),
        post_of_pair=np.array([number[pair.post_id] for pair in dataset.pairs], dtype=np.int32),
        pad_id=int(encoder.tokenizer.pad_token_id),
        shortened=shortened,
    )
    return encoded, _statistics(encoder, dataset, fitted, cut, lengths)


def _statistics(
    encoder: PromptEncoder,
    dataset: Dataset,
    fitted: dict[str, FittedPost],
    cut: Sequence[int],
    lengths: "np.ndarray",
) -> dict[str, Any]:
    """`cut`: the rows that the tokenizer cut."""
    rules = encoder.rules
    # Windows together hold the whole post, so `sliding` removes no tokens.
    removed = [fit.tokens - fit.kept for fit in fitted.values() if fit.shortened and rules.long_post != "sliding"]
    statistics = {
        "long_post": rules.long_post,
        "max_length": rules.max_length,
        "post_limit_tokens": rules.post_limit,
        "prompts": len(lengths),
        "posts_shortened": len(removed),
        "posts_spelling_special_tokens": sum(encoder.as_text(post) != post for post in dataset.posts.values()),
        "posts_in_windows": sum(len(fit.texts) > 1 for fit in fitted.values()),
        "tokens_removed_mean": sum(removed) / len(removed) if removed else 0.0,
        "tokens_removed_max": max(removed, default=0),
        "prompt_tokens_mean": float(lengths.mean()),
        "prompt_tokens_max": int(lengths.max()),
        "prompts_cut_by_tokenizer": len(cut),
    }
    if rules.long_post == "none":
        # A cut on the right removes part of the question first, and with the longest posts the whole criterion.
        all_post = {
            post_id
            for post_id, post in dataset.posts.items()
            if encoder.count(f"post: {post}, criterion:") >= rules.max_length
        }
        statistics |= {
            "prompts_without_question": len(cut),
            "prompts_without_criterion": sum(pair.post_id in all_post for pair in dataset.pairs),
        }
    return statistics


def encoding_summary(statistics: dict[str, Any], posts: int) -> str:
    """One line about the lengths of the prompts and the handling of long posts."""
    mode, windowed, shortened = statistics["long_post"], statistics["posts_in_windows"], statistics["posts_shortened"]
    if mode == "none":
        fitted = f"{statistics['prompts_cut_by_tokenizer']:,} of {statistics['prompts']:,} cut on the right"
    elif mode == "sliding":
        fitted = f"{windowed:,} of {posts:,} posts ({windowed / posts:.0%}) in several windows"
    else:
        fitted = f"{shortened:,} of {posts:,} posts ({shortened / posts:.0%}) shortened ({mode})"
    mean, most = statistics["prompt_tokens_mean"], statistics["prompt_tokens_max"]
    return f"Prompts: {mean:.0f} tokens on average, {most} at most; {fitted}"


def encoding_warnings(statistics: dict[str, Any]) -> list[str]:
    """Warnings about prompts that were cut, and about posts that spell tokens."""
    warnings = []
    if spelling := statistics["posts_spelling_special_tokens"]:
        warnings.append(
            f"{counted(spelling, 'post')} spelt special tokens of the base model, such as </s>: a space within each "
            "keeps it text"
        )
    if statistics.get("prompts_without_question"):
        warnings.append(
            f"prompt.long_post=none: {statistics['prompts_without_question']} of {statistics['prompts']} prompts lost "
            f"the question and {statistics['prompts_without_criterion']} of them the whole criterion, so pairs of one "
            "post look alike; prompt.long_post=head_tail keeps both"
        )
    elif statistics["prompts_cut_by_tokenizer"]:
        warnings.append(f"{statistics['prompts_cut_by_tokenizer']} prompts were cut by the tokenizer after fitting")
    return warnings
