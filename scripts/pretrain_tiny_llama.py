"""Make `models/tiny_llama`: a Llama of a quarter of a million weights that has learned to read the synthetic posts.

A randomly initialised tiny Llama stays near chance within any quickstart's budget, so the committed one is trained here
once, on posts of another seed and of the "seen" phrasings only: whatever `data/sample` says in held-out phrasings
is new to it. One thread of a CPU, some minutes:

    python scripts/pretrain_tiny_llama.py --out models/tiny_llama

Loss = answer + 0.5 x language model + 0.5 x sentence tag.
- answer: the token " yes" or " no" after the exact FR-002 prompt.
- sentence tag: what a sentence says about which symptom (evidence, hard negative, neutral), read off its last token.
  Without it the match between sentence and criterion takes far longer to appear. Its head is thrown away.

The criteria asked about one post share the encoded post: each question attends to the post and to itself only, and
takes the positions that it would have alone: the same computation as one prompt per pair, at a third of the cost.
"""

import argparse
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raycv.data.phrases import EVIDENCE, NEUTRAL, Sentence, compose, paragraphs
from raycv.data.synthetic import CRITERIA
from raycv.data.types import SYMPTOMS as CODES

SYMPTOMS = tuple(CODES)
LOGGER = logging.getLogger("pretrain_tiny_llama")

QUESTION = " {criterion} Does the post match the criterion description? Output yes or no"
CRITERION_TEXT = {str(criterion.symptom): criterion.text for criterion in CRITERIA}
# One tag for "neutral", one for evidence and one for any hard negative of each symptom.
TAGS = 1 + 2 * len(SYMPTOMS)
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """What was found to work; the numbers are in models/tiny_llama/README.md."""

    seed: int = 20251112
    steps: int = 1500
    batch_posts: int = 32
    questions_per_post: int = 4
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.05
    words_max: int = 60
    """Words per post at the end of the curriculum, which begins at one or two sentences."""
    curriculum_share: float = 0.5
    long_every: int = 8
    """After the curriculum, every so many steps a smaller batch of long posts: positions up to 512 get trained too."""
    long_words_max: int = 320
    long_batch_posts: int = 6
    vocabulary: int = 1400
    language_weight: float = 0.5
    tag_weight: float = 0.5


@dataclass(frozen=True)
class Example:
    """A post, the symptoms that it is positive for and those to ask about."""

    sentences: list[Sentence]
    present: list[str]
    asked: list[str]


@dataclass(frozen=True)
class Batch:
    """B posts of L tokens at most: post first, then its questions side by side."""

    tokens: Tensor
    """[B, L] token ids."""
    positions: Tensor
    """[B, L] positions; each question continues from the post's end."""
    mask: Tensor
    """[B, 1, L, L] True where row may attend to column."""
    next_tokens: Tensor
    """[B, L] next token of the post, or IGNORED."""
    answers: Tensor
    """[B, L] " yes" or " no" at the last token of a question, or IGNORED."""
    tags: Tensor
    """[B, L] tag at the last token of a sentence, or IGNORED."""


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = Recipe(steps=arguments.steps)
    # One thread: sums are taken in the same order on every run of the same machine.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)

    tokenizer = build_tokenizer(recipe)
    model = build_model(tokenizer)
    train(model, tokenizer, recipe)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the corpus with Llama's habits: unk 0, bos 1 put before every text, eos 2, no pad token."""
    rng = random.Random(f"raycv-pretraining-vocabulary-{recipe.seed}")
    texts = [
        prefix_text(draw_example(rng, recipe.words_max, 3, 1)) + question(rng.choice(SYMPTOMS)) for _ in range(6000)
    ]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Three layers of width 64; positions up to 4096, so that max_length=512 and more are legal."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """AdamW with a linear warm-up and a cosine decay to zero."""
    tag_head = nn.Linear(model.config.hidden_size, TAGS)
    parameters = [*model.parameters(), *tag_head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, recipe.warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps - recipe.warmup),
        ],
        [recipe.warmup],
    )
    model.train()
    began = time.process_time()
    for step, batch in enumerate(batches(tokenizer, recipe), 1):
        answer, language, tag = losses(model, tag_head, batch)
        total = answer + recipe.language_weight * language + recipe.tag_weight * tag
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == recipe.steps:
            LOGGER.info(
                "step %d answer %.4f language %.3f tag %.3f, %.0f CPU-seconds",
                *(step, answer.item(), language.item(), tag.item(), time.process_time() - began),
            )


def losses(model: LlamaForCausalLM, tag_head: nn.Linear, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Answer, language and tag loss, each the mean over its own positions."""
    hidden = model.model(
        input_ids=batch.tokens, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state

    def at_targets(head: nn.Module, targets: Tensor) -> Tensor:
        chosen = targets != IGNORED
        return cross_entropy(head(hidden[chosen]), targets[chosen])

    return (
        at_targets(model.lm_head, batch.answers),
        at_targets(model.lm_head, batch.next_tokens),
        at_targets(tag_head, batch.tags),
    )


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[Batch]:
    """`recipe.steps` batches, short posts first."""
    rng = random.Random(f"raycv-pretraining-{recipe.seed}")
    questions = {symptom: tokenizer(question(symptom), add_special_tokens=False).input_ids for symptom in SYMPTOMS}
    for step in range(recipe.steps):
        progress = min(1.0, step / (recipe.curriculum_share * recipe.steps))
        words_max, posts = 14 + round(progress * (recipe.words_max - 14)), recipe.batch_posts
        if progress == 1.0 and step % recipe.long_every == 0:
            words_max, posts = recipe.long_words_max, recipe.long_batch_posts
        most = 1 if progress < 0.3 else 3
        examples = [draw_example(rng, words_max, most, recipe.questions_per_post) for _ in range(posts)]
        yield collate(examples, tokenizer, questions)


def draw_example(rng: random.Random, words_max: int, most_symptoms: int, questions: int) -> Example:
    """A post of seen phrasings only, all symptoms equally frequent, and the symptoms to ask about.

    Asked are those that it is positive for, then those that it merely mentions, then others.
    """
    present = rng.sample(SYMPTOMS, min(most_symptoms, rng.choice((0, 1, 1, 1, 2, 2, 3))))
    sentences = compose(rng, present, rng.randint(6, words_max), held_out_rate=0.0)
    mentioned = sorted({str(s.symptom) for s in sentences if s.symptom} - set(present))
    rest = [symptom for symptom in SYMPTOMS if symptom not in present and symptom not in mentioned]
    # At least one question about a symptom that is not even mentioned.
    asked = [*present, *rng.sample(mentioned, len(mentioned))][: questions - 1]
    return Example(sentences, present, asked + rng.sample(rest, min(len(rest), questions - len(asked))))


def question(symptom: str) -> str:
    """What follows `post: ..., criterion:` in the prompt."""
    return QUESTION.format(criterion=CRITERION_TEXT[symptom])


def prefix_text(example: Example) -> str:
    """The prompt as far as it is the same for all criteria; ends where the tokenizer splits anyway."""
    return f"post: {paragraphs(example.sentences, 6)}, criterion:"


def collate(examples: list[Example], tokenizer: PreTrainedTokenizerFast, questions: dict[str, list[int]]) -> Batch:
    """Examples as one padded batch. Segment 0 is the post, 1.. are its questions, -1 is padding."""
    encoded = tokenizer([prefix_text(example) for example in examples])
    lengths = [
        len(prefix) + sum(len(questions[symptom]) for symptom in example.asked)
        for prefix, example in zip(encoded.input_ids, examples, strict=True)
    ]
    shape = (len(examples), max(lengths))
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1)
    next_tokens, answers, tags = (torch.full(shape, IGNORED) for _ in range(3))
    for row, (example, prefix) in enumerate(zip(examples, encoded.input_ids, strict=True)):
        end = len(prefix)
        tokens[row, :end], positions[row, :end], segments[row, :end] = torch.tensor(prefix), torch.arange(end), 0
        next_tokens[row, : end - 1] = tokens[row, 1:end]
        for char, tag in sentence_ends(example):
            tags[row, encoded.char_to_token(row, char)] = tag
        for segment, symptom in enumerate(example.asked, 1):
            start, end = end, end + len(questions[symptom])
            tokens[row, start:end], segments[row, start:end] = torch.tensor(questions[symptom]), segment
            positions[row, start:end] = len(prefix) + torch.arange(end - start)
            answers[row, end - 1] = answer_token(tokenizer, symptom in example.present)
    return Batch(tokens, positions, attention_mask(segments), next_tokens, answers, tags)


def answer_token(tokenizer: PreTrainedTokenizerFast, positive: bool) -> int:
    """The id of " yes" or " no"; both are words of every prompt, so that the BPE holds each as one token."""
    (token,) = tokenizer(" yes" if positive else " no", add_special_tokens=False).input_ids
    return int(token)


def sentence_ends(example: Example) -> Iterator[tuple[int, int]]:
    """(index of the last character in the prefix text, tag) of each sentence."""
    text, char = prefix_text(example), 0
    for sentence in example.sentences:
        char = text.index(sentence.text, char) + len(sentence.text)
        if sentence.kind == NEUTRAL:
            tag = 0
        else:
            tag = 1 + 2 * SYMPTOMS.index(str(sentence.symptom)) + (sentence.kind == EVIDENCE)
        yield char - 1, tag


def attention_mask(segments: Tensor) -> Tensor:
    """[B, 1, L, L] from segments [B, L]: causal, the post for all, a question for itself; padding sees itself only."""
    row, column = segments[:, :, None], segments[:, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & (row >= 0) & ((column == 0) | (column == row))
    return (visible | torch.eye(length, dtype=torch.bool))[:, None]


if __name__ == "__main__":
    main()
