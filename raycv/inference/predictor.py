"""Computes the probabilities of pairs with the model of one or several checkpoints."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from raycv.common.devices import CPU_FOR_INFERENCE, inference_device
from raycv.config.schema import InferenceConfig, Precision
from raycv.data.prompt_encoder import REWRITE, EncodedPairs, PromptEncoder, UnreadableTextError
from raycv.data.prompt_template import FittedPost, render
from raycv.errors import UserError
from raycv.inference.questions import CHUNK_PAIRS, SCORE_DECIMALS, ModelIdentity, Prediction
from raycv.model.attention import KERNEL, PLAIN, attention_of, earlier_attention
from raycv.model.base_files import BaseFiles
from raycv.model.base_model import fetch_trained_base
from raycv.model.checkpoint import DAMAGED, CheckpointInfo, load_adapter, read_info
from raycv.model.dora import prepared
from raycv.model.int8 import check_int8, to_int8
from raycv.model.loading import load_classifier, load_config, load_tokenizer, rows_of_embedding
from raycv.row_faults import listed
from raycv.training.forward import Layout, RowScorer, in_order
from raycv.training.memory import MicroBatch
from raycv.utils import pin_kernels

REMEDIES = (
    "compute in half the memory where the device is fast at it: infer.precision=bf16",
    f"use a device with more memory, or compute on the CPU: {CPU_FOR_INFERENCE}",
)
Computed = Literal["fp32", "bf16", "int8"]


class Predictor:
    """Scores (post, criterion) pairs with one checkpoint, or with the mean of several of one run."""

    def __init__(
        self,
        checkpoints: Sequence[Path],
        config: InferenceConfig,
        tell: Callable[[str], None] = lambda text: None,
        base: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
            checkpoints: One checkpoint folder, or those of several folds of one run.
            config: Device, precision and batch size.
            tell: Gets each warning for the user, such as a fallback or a smaller batch.
            base: Folder or hub id of the base model now; None for where training found it.

        Raises:
            UserError: A checkpoint is missing, damaged or from another run. The base model cannot be loaded. The
                device cannot compute the requested precision. torch cannot use the GPU of this machine.
        """
        pin_kernels()
        infos = [read_info(folder) for folder in checkpoints]
        _check_kin(infos, checkpoints)
        self.info = infos[0]
        self.identity = ModelIdentity(
            self.info.run, "ensemble" if len(infos) > 1 else self.info.fold, self.info.base_model
        )
        self.threshold = round(statistics.fmean(info.threshold for info in infos), SCORE_DECIMALS)
        self.device = inference_device(config.device)
        self.computed_in = choose_precision(config.precision, self.info.precision, self.device)
        if self.computed_in == "int8":
            check_int8(self.device, len(infos))
        # int8 weights are rounded from the weights that training computed with, so we load those.
        wide = self.info.precision if self.computed_in == "int8" else self.computed_in
        self._dtype = torch.bfloat16 if wide == "bf16" else torch.float32
        files = fetch_trained_base(self.info.base_model, self.info.base_revision, base)
        _check_base(files, self.info, base, tell)
        model_config = load_config(files)
        tokenizer = load_tokenizer(files, model_config)
        if base is not None:
            _check_words(tokenizer, checkpoints[0], base)
        self.encoder = PromptEncoder(tokenizer, self.info.rules, rows_of_embedding(model_config))
        classifier = load_classifier(
            files,
            tokenizer,
            self._dtype,
            seed=0,
            device=str(self.device),
            plain_attention=any(info.attention == PLAIN for info in infos),
            tell=tell,
        )
        self.attention, self.earlier_attention = attention_of(classifier), earlier_attention(classifier.config)
        _check_attention(self.attention, {info.attention or self.earlier_attention for info in infos}, tell)
        # Adapters stay beside the base in gamma form (raycv.model.dora). This is exact in any type, and one base
        # serves all folds.
        self.model = load_adapter(classifier, *checkpoints)
        self.adapters = list(self.model.peft_config)
        # Nothing changes the weights any more, so DoRA's norms are computed once, for each fold.
        self._prepared = ExitStack()
        self._prepared.enter_context(prepared(self.model, self._dtype))
        self._batch = MicroBatch(config.batch_size, tell, remedies=REMEDIES)
        self._layout: Layout = "shared" if self._may_pack(tell) else "padded"
        if self.computed_in == "int8":
            # We convert after the check of packing, since the steps of int8 would hide whether the logits agree.
            self._prepared.close()
            self.model, self.adapters = to_int8(self.model), []

    @property
    def precision_of_auto(self) -> str:
        """The precision that `auto` would choose here."""
        return choose_precision("auto", self.info.precision, self.device)

    def check_pair(self, post: str, criterion: str) -> None:
        """Raises: UserError if `criterion` leaves no room for a word of `post`, or the post cannot be read as text."""
        self._fit(post, self._post_limit(criterion))

    @torch.inference_mode()
    def predict(self, pairs: Sequence[tuple[str, str]]) -> list[Prediction]:
        """A prediction for each pair, in their order. If the model can pack, a post is computed once for its criteria.

        Args:
            pairs: (post text, criterion text); neither text may be empty.

        Raises:
            UserError: A pair does not fit the prompt, or the model returned NaN or infinity.
        """
        predictions: list[Prediction] = []
        for start in range(0, len(pairs), CHUNK_PAIRS):
            encoded, truncated = self._encode(pairs[start : start + CHUNK_PAIRS])
            scores = self._scores(encoded)
            predictions += [Prediction(float(score), cut) for score, cut in zip(scores, truncated, strict=True)]
        return predictions

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> tuple[EncodedPairs, list[bool]]:
        """The pairs as token rows, and for each pair whether its post was cut."""
        fitted: dict[tuple[str, int], tuple[int, FittedPost]] = {}
        prompts: list[str] = []
        pair_of_row: list[int] = []
        post_of_pair: list[int] = []
        truncated: list[bool] = []
        limits = {criterion: self._post_limit(criterion) for criterion in {criterion for _, criterion in pairs}}
        for index, (post, criterion) in enumerate(pairs):
            key = (post, limits[criterion])
            if key not in fitted:
                fitted[key] = (len(fitted), self._fit(*key))
            number, fit = fitted[key]
            prompts += [render(text, criterion) for text in fit.texts]
            pair_of_row += [index] * len(fit.texts)
            post_of_pair.append(number)
            mode, most = self.encoder.rules.long_post, self.encoder.rules.max_length
            cut = self.encoder.count(prompts[-1]) > most if mode == "none" else fit.shortened and mode != "sliding"
            truncated.append(bool(cut))
        input_ids, lengths = self.encoder.tokens(prompts)
        encoded = EncodedPairs(
            input_ids=input_ids,
            lengths=lengths,
            pair_of_row=np.array(pair_of_row, dtype=np.int32),
            labels=np.zeros(len(pairs), dtype=np.int64),
            post_of_pair=np.array(post_of_pair, dtype=np.int32),
            pad_id=int(self.encoder.tokenizer.pad_token_id),
        )
        return encoded, truncated

    def _post_limit(self, criterion: str) -> int:
        """Tokens that a post may take beside `criterion`: training's limit, or less beside a longer criterion."""
        rules, count = self.encoder.rules, self.encoder.count
        try:
            empty = count(render("", ""))
            room = rules.max_length - (count(render("", criterion)) - empty)
        except UnreadableTextError as error:
            raise _unreadable("criterion", error) from error
        if rules.long_post != "none" and room <= empty:
            raise UserError(
                f"The criterion and the question take {rules.max_length - room + empty} of the prompt's "
                f"{rules.max_length} tokens, which leaves no room for a post.",
                kind="prompt-length",
                remedies=["shorten the criterion"],
            )
        return min(rules.post_limit, room)

    def _fit(self, post: str, limit: int) -> FittedPost:
        """`post` in at most `limit` tokens of the prompt. Raises: UserError if nothing of it fits."""
        rules = self.encoder.rules
        try:
            return self.encoder.with_limit(limit).fit(post)
        except UnreadableTextError as error:
            raise _unreadable("post", error) from error
        except UserError as error:
            # The encoder's remedies name keys of training, which inference lacks, so we give others.
            short = limit < rules.post_limit
            raise UserError(
                f"The {'criterion' if short else 'longest criterion of the run'} and the question leave no room for a "
                f"word of the post in the prompt's {rules.max_length} tokens.",
                kind="prompt-length",
                remedies=["shorten the criterion" if short else "take a run with a larger prompt.max_length"],
            ) from error

    def _scores(self, encoded: EncodedPairs) -> np.ndarray:
        """float64 [P]: the probability of each pair, the maximum over its windows, the mean over the folds."""
        scorer = RowScorer(self.model, encoded, self.device, self._autocast)
        rows = scorer.sorted(np.arange(len(encoded.lengths)), self._layout)
        probabilities = []
        for _ in self._as_each_fold():
            logits = self._logits(scorer, rows).double()
            scores = np.zeros(len(encoded.labels))
            if not bool(logits.isfinite().all()):
                raise UserError(
                    "The model computed NaN or infinity, which is not an answer.",
                    kind="training-loss",
                    remedies=["compute in single precision: infer.precision=fp32", *DAMAGED],
                )
            np.maximum.at(scores, encoded.pair_of_row[rows], torch.softmax(logits, dim=-1)[:, 1].numpy())
            probabilities.append(scores)
        return np.mean(probabilities, axis=0)

    def _as_each_fold(self) -> Iterator[None]:
        """Sets the model to one fold after the other. An int8 model has one fold, whose adapter is merged."""
        if not self.adapters:
            yield
        for adapter in self.adapters:
            self.model.set_adapter(adapter)
            yield

    def _logits(self, scorer: RowScorer, rows: np.ndarray) -> torch.Tensor:
        """Logits [R, 2] of sorted `rows`, in batches that fit the memory."""
        done: list[tuple[np.ndarray, torch.Tensor]] = []

        def work(size: int) -> torch.Tensor:
            for batch in scorer.batches(rows, size, self._layout):
                done.append((batch.rows, scorer.logits(batch).cpu()))
            return in_order(rows, done)

        return self._batch.run(work, done.clear)

    def _autocast(self) -> AbstractContextManager[None]:
        if self._dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.inference_mode()
    def _may_pack(self, tell: Callable[[str], None]) -> bool:
        """Whether a post may be computed once for several criteria (packing), by a test on a short post's logits."""
        encoded, _ = self._encode([("a post", "one"), ("a post", "another")])
        trouble = RowScorer(self.model, encoded, self.device, self._autocast).check_packing(
            self.encoder.rules.max_length
        )
        if trouble is not None:
            tell(f"every pair is computed on its own: {trouble}")
        return trouble is None


def _unreadable(what: str, error: UnreadableTextError) -> UserError:
    return UserError(f"The base model cannot read the {what}: {error.what}.", kind=error.kinds, remedies=REWRITE)


def _check_base(files: BaseFiles, info: CheckpointInfo, given: str | None, tell: Callable[[str], None]) -> None:
    """Refuses a base model that is not the one of training, unless the user gave it.

    A `given` base model may be a converted copy, so `tell` only gets a warning.

    Raises:
        UserError: The files are not those of training, and no base model was given.
    """
    now = files.sums()
    other = [name for name, known in info.base_sums.items() if now.get(name) != known]
    if not other:
        return
    if given is not None:
        tell(f"base={given} is not, file by file, the model that was trained on ({listed(other)}): scores may be off")
        return
    raise UserError(
        f"The base model in {files.path} is not the one that was trained on: {listed(other)} changed.",
        kind="base-changed",
        remedies=[
            "put the files of training back, or name the folder that has them: base=<folder>",
            f"if these are to answer all the same: base={files.path}",
        ],
    )


def _check_attention(now: str, before: set[str], tell: Callable[[str], None]) -> None:
    """Tells if a checkpoint was trained with another attention than the model computes `now`."""
    if before != {now}:
        tell(
            f"Warning: the checkpoint was trained with {KERNEL} attention and is computed with {now}: scores may be "
            "off, so train it again"
        )


def _check_words(tokenizer: Any, checkpoint: Path, given: str) -> None:
    """Raises: UserError if the base model `given` has another vocabulary than the checkpoint."""
    from transformers import AutoTokenizer

    try:
        trained = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError):
        # A checkpoint of stock PEFT may lack a tokenizer, so there is nothing to compare.
        return
    if trained.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"base={given}: its tokenizer has other words than the checkpoint's, so it is another model.",
            kind="base-changed",
            remedies=["give the model that the run was trained on: base=<folder or hub id>", "leave base out"],
        )


def choose_precision(asked: Precision, trained: str, device: torch.device) -> Computed:
    """The type to compute in. `auto` is the type of training, or fp32 if `device` is slow at bf16."""
    if asked != "auto":
        return asked
    if trained != "bf16":
        return "fp32"
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_fast_bf16()
    return "bf16" if fast else "fp32"


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _check_kin(infos: Sequence[CheckpointInfo], folders: Sequence[Path]) -> None:
    """Raises: UserError if the checkpoints do not belong together."""
    for info, folder in zip(infos, folders, strict=True):
        for field in ("base_model", "base_revision", "rules", "criteria_hash"):
            if getattr(info, field) != getattr(infos[0], field):
                raise UserError(
                    f"{folder} is of another run than {folders[0]}: its {field} differs.", kind="checkpoint-damaged"
                )
