"""A checkpoint's scores at inference are those of training, in every long-post mode and for any mixture of pairs."""

import shutil
import socket
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from support.builders import tiny_gemma2
from support.refusals import refuses
from support.toy import WORDS, Recorder, Toy, positions, prompt_config, toy_base, toy_dataset, train_config

import raycv.inference.predictor
import raycv.model.dora as dora
import raycv.model.int8
from raycv.config.schema import InferenceConfig
from raycv.data.prompt_encoder import PromptEncoder
from raycv.inference.predictor import Predictor, choose_precision
from raycv.model.adapters import Float32Head
from raycv.model.attention import attention_of
from raycv.model.base_model import fetch_base
from raycv.model.checkpoint import save_checkpoint
from raycv.model.dora import factored_layers
from raycv.model.int8 import Int8Linear, has_fast_int8, quantise, to_int8
from raycv.training.loop import FoldTrainer

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GPU_HERE = torch.cuda.is_available()
TRAIN, VAL = np.arange(30), np.arange(30, 48)
MODES = ("head_tail", "sliding", "none")
needs_int8 = pytest.mark.skipif(not has_fast_int8(), reason="this CPU has no 8-bit products")


class Trained:
    """A toy fold after an epoch: its checkpoint, and its validation scores in the loop."""

    def __init__(self, folder: Path, mode: str, fold: int) -> None:
        # Prompts of 26 tokens, 15 of them the frame: the longer of these posts do not fit.
        prompt = prompt_config(max_length=26, long_post=mode)
        self.toy = Toy(toy_base(folder), toy_dataset(words=24), prompt)
        model = self.toy.model(seed=1 + fold, dropout=0.1)
        loop = FoldTrainer(model, self.toy.encoded, train_config(epochs=1, seed=1 + fold), "fp32", Recorder())
        self.scores = loop.fit(TRAIN, VAL).val_scores
        self.folder = folder / f"checkpoint_{fold}"
        self.info = self.toy.info(threshold=0.3 + fold / 10, fold=fold)
        save_checkpoint(self.folder, model, self.toy.tokenizer, self.info)

    def pairs(self, indices: np.ndarray = VAL) -> list[tuple[str, str]]:
        """The texts of pairs."""
        dataset = self.toy.dataset
        chosen = [dataset.pairs[index] for index in indices]
        return [(dataset.posts[pair.post_id], dataset.criteria[pair.criterion_id].text) for pair in chosen]

    def rewritten(self, folder: Path, **changes: object) -> Path:
        """The same checkpoint with another manifest."""
        save_checkpoint(folder, self.toy.model(), self.toy.tokenizer, replace(self.info, **changes))
        return folder


def test_another_base_than_that_of_training_is_refused_and_one_that_is_given_is_told(trained, tmp_path):
    """Its weights changed where they lay, or the base of another model: labels would flip without a word."""
    fold = trained("none", 0)
    config = InferenceConfig(precision="fp32", batch_size=4)
    base = shutil.copytree(fold.toy.base.path, tmp_path / "base")
    sums = fetch_base(str(base), None).sums()
    checkpoint = fold.rewritten(tmp_path / "checkpoint", base_model=str(base), base_sums=sums)
    told: list[str] = []
    Predictor([checkpoint], config, told.append)
    assert told == []
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with refuses("base-changed", f"in {base}", "'model.safetensors' changed", "base=<folder>", f"base={base}"):
        Predictor([checkpoint], config, told.append)
    Predictor([checkpoint], config, told.append, str(base))
    assert told == [
        f"base={base} is not, file by file, the model that was trained on ('model.safetensors'): scores may be off"
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a fold of a mode, once."""

    @cache
    def train(mode: str = "head_tail", fold: int = 0) -> Trained:
        return Trained(places(mode), mode, fold)

    @cache
    def places(mode: str) -> Path:
        return tmp_path_factory.mktemp(mode)

    return train


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def predictor(*folders: Path, precision: str = "fp32", batch_size: int = 16, tell=lambda text: None) -> Predictor:
    return Predictor(folders, InferenceConfig(precision=precision, batch_size=batch_size), tell)


def scores(predictor: Predictor, pairs: list[tuple[str, str]]) -> np.ndarray:
    return np.array([prediction.score for prediction in predictor.predict(pairs)])


def test_answers_compute_no_norm_of_dora(trained, monkeypatch):
    """Each is computed once for each fold, when the model is loaded."""
    folds = [trained("head_tail", fold) for fold in (0, 1)]
    calls = []
    real = dora.factored_norm
    monkeypatch.setattr(dora, "factored_norm", lambda *args: calls.append(1) or real(*args))
    ensemble = predictor(*(fold.folder for fold in folds))
    assert len(calls) == 2 * len(factored_layers(ensemble.model)) > 0
    scores(ensemble, folds[0].pairs())
    assert len(calls) == 2 * len(factored_layers(ensemble.model))


def test_the_cpu_answers_in_place_of_a_gpu_only_when_it_is_asked_for(trained, unusable_gpu, monkeypatch):
    """The machine shows a GPU, which no torch here can use."""
    fold = trained()
    if not GPU_HERE:
        with refuses("gpu-unusable", f"NVIDIA GPU of {socket.gethostname()}", "driver 470.82.01", "infer.device=cpu"):
            predictor(fold.folder)
    asked = Predictor([fold.folder], InferenceConfig(precision="fp32", batch_size=16, device="cpu"))
    answers = scores(asked, fold.pairs())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    np.testing.assert_array_equal(answers, scores(predictor(fold.folder), fold.pairs()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.long
def test_scores_are_those_of_the_training_loop(trained, mode, batch_size):
    fold = trained(mode)
    np.testing.assert_allclose(
        scores(predictor(fold.folder, batch_size=batch_size), fold.pairs()), fold.scores, atol=1e-6
    )
    assert np.ptp(fold.scores) > 1e-2, "equal scores would show nothing"


def test_kernels_are_those_of_training(trained):
    folder = trained("head_tail").folder
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    predictor(folder)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("mode", MODES)
def test_cut_posts_are_told(trained, mode):
    fold = trained(mode)
    told = [prediction.truncated for prediction in predictor(fold.folder).predict(fold.pairs())]
    count = fold.toy.tokenizer
    long = [len(count(f"post: {post}, criterion: {text} Does")["input_ids"]) > 20 for post, text in fold.pairs()]
    assert any(told) == (any(long) and mode != "sliding")
    assert not all(told)


@pytest.mark.parametrize("mode", MODES)
def test_a_pairs_score_does_not_depend_on_its_company(trained, mode):
    """Posts with one to nine criteria, in any order, some twice: each pair as if it were asked alone."""
    fold = trained(mode)
    model = predictor(fold.folder)
    posts = list(fold.toy.dataset.posts.values())[:9]
    pairs = [(post, WORDS[index]) for number, post in enumerate(posts, 1) for index in range(number)]
    order = np.random.default_rng(0).permutation(len(pairs))
    mixed = [pairs[index] for index in order] + pairs[:1]
    together = scores(model, mixed)
    alone = np.array([scores(model, [pair])[0] for pair in mixed])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert together[-1] == pytest.approx(together[list(order).index(0)], abs=1e-6)


@pytest.mark.parametrize(
    "precision",
    ["fp32", pytest.param("int8", marks=pytest.mark.skipif(not has_fast_int8(), reason="no 8-bit products"))],
)
def test_a_post_is_computed_once_for_all_its_criteria(trained, precision):
    """Nine criteria of S tokens under a post of P take P + 9 S positions, not 9 (P + S), wherever the nine stand."""
    fold = trained()
    model = predictor(fold.folder, precision=precision)
    posts = [" ".join(WORDS[start : start + 8]) for start in (0, 2, 4)]
    prefix, suffix = 1 + 8 + 1, 1 + 11  # post: the post, criterion: | the criterion, the question
    nine = [(post, criterion) for criterion in WORDS[:9] for post in posts]
    with positions(model.model) as computed:
        model.predict(nine)
    assert sum(computed) == 3 * (prefix + 9 * suffix) < 0.6 * 9 * 3 * (prefix + suffix)
    with positions(model.model) as computed:
        model.predict(nine[:1])
    assert computed == [prefix + suffix]


def test_a_post_that_spells_a_special_token_is_scored_as_text(trained):
    """As in training. A post that still becomes a token without an embedding is refused, and not repeated."""
    asked = predictor(trained().folder)
    spelt, text, token = scores(asked, [(post, "w3") for post in ("w1 </s> w2", "w1 < /s> w2", "w1 w9 w2")])
    assert spelt == text != token
    tokenizer = asked.encoder.tokenizer
    rows = len(tokenizer) - 1
    asked.encoder = PromptEncoder(tokenizer, asked.encoder.rules, rows)
    asked.check_pair("w1 w2", "w3")
    last = tokenizer.convert_ids_to_tokens(rows)
    for ask in (asked.check_pair, lambda *pair: asked.predict([pair])):
        with refuses("data-text", "the post: ", f"token {rows}, ") as caught:
            ask(f"w1 {last} w2", "w3")
        assert last not in str(caught.value)


def test_no_pairs_no_predictions(trained):
    assert predictor(trained().folder).predict([]) == []


@pytest.mark.long
def test_the_ensemble_is_the_mean_of_its_folds(trained):
    folds = [trained(fold=fold) for fold in range(3)]
    ensemble = predictor(*(fold.folder for fold in folds))
    single = [scores(predictor(fold.folder), fold.pairs()) for fold in folds]
    np.testing.assert_allclose(scores(ensemble, folds[0].pairs()), np.mean(single, axis=0), atol=1e-6)
    assert np.abs(single[0] - single[1]).max() > 1e-3
    assert ensemble.threshold == pytest.approx(0.4)
    assert (ensemble.identity.fold, predictor(folds[1].folder).identity.fold) == ("ensemble", 1)


@pytest.mark.parametrize(
    ("precision", "mode", "most"),
    [("bf16", "head_tail", 0.03), *(pytest.param("int8", mode, 0.05, marks=needs_int8) for mode in MODES)],
)
def test_a_precision_of_fewer_bits_is_close_and_not_the_same(trained, precision, mode, most):
    fold = trained(mode)
    model = predictor(fold.folder, precision=precision)
    assert model.computed_in == precision
    difference = np.abs(scores(model, fold.pairs()) - fold.scores)
    assert 0 < difference.max() < most


def test_layers_are_given_up_one_by_one_as_they_are_rounded(trained, monkeypatch):
    """A 7B's float32 layers never stand in memory side by side."""
    toy = trained().toy
    model = toy.model()
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    left = [weakref.ref(layer.get_base_layer()) for layer in layers]
    number = len(left)
    del layers
    alive = []

    def spy(classifier, name):
        quantise(classifier, name)
        alive.append(sum(layer() is not None for layer in left))

    monkeypatch.setattr(raycv.model.int8, "quantise", spy)
    to_int8(model)
    assert alive[:number] == [*range(number, 0, -1)]


@needs_int8
def test_in_int8_all_but_the_head_is_rounded_with_the_adapter_in_it(trained):
    fold = trained()
    model = predictor(fold.folder, precision="int8").model
    rounded = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(rounded) == 7 * model.config.num_hidden_layers
    assert isinstance(model.score, Float32Head)
    assert model.score.weight.dtype == torch.float32
    assert not any("lora" in name for name, _ in model.named_modules())
    # What PEFT merges, by DoRA's definition.
    layer = predictor(fold.folder).model.get_base_model().model.layers[0].mlp.up_proj
    parts = layer.parts("default")
    dense = parts.weight + layer.scaling["default"] * parts.b @ parts.a
    merged = parts.magnitude[:, None] * dense / dense.norm(dim=1, keepdim=True)
    int8 = rounded["model.layers.0.mlp.up_proj"]
    step = int8.scale[:, None]
    assert ((int8.codes * step - merged).abs() <= step * 0.501).all()
    assert (merged - parts.weight).abs().max() > step.max(), "the adapter does something"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products_are_those_of_rounded_numbers(dtype):
    """Against float64 on the rounded weights and inputs; with a bias, a row of zeros, and leading dimensions."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 24).to(dtype)
    linear.weight.data[3] = 0
    x = torch.randn(2, 5, 64, dtype=dtype)
    x[0, 1] = 0
    x[1, 2] *= 1000  # one large token does not spoil the others
    layer = Int8Linear(linear)
    wide = x.double()
    step = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    rounded = (wide / step).round() * step
    exact = rounded @ (layer.codes.double() * layer.scale.double()[:, None]).T + linear.bias.double()
    got = layer(x)
    assert (got.dtype, got.shape) == (dtype, (2, 5, 24))
    # Row by row, as their sizes differ; the output is rounded to `dtype`.
    size = exact.norm(dim=-1)
    assert ((got.double() - exact).norm(dim=-1) <= torch.finfo(dtype).eps * size + 1e-3 * size).all()
    unrounded = torch.nn.functional.linear(wide, linear.weight.double(), linear.bias.double())
    assert ((got.double() - unrounded).norm(dim=-1) <= 0.02 * size).all()


def test_int8_is_refused_where_it_makes_no_sense(trained, monkeypatch):
    with refuses("config-value", "infer.precision=int8", "has a GPU", "CUDA_VISIBLE_DEVICES="):
        raycv.model.int8.check_int8(GPU, 1)
    monkeypatch.setattr(raycv.model.int8, "has_fast_int8", lambda: True)
    with refuses("config-value", "infer.precision=int8", "2 whole models", "fold=best"):
        predictor(trained().folder, trained(fold=1).folder, precision="int8")
    monkeypatch.setattr(raycv.model.int8, "has_fast_int8", lambda: False)
    with refuses("config-value", "infer.precision=int8", "no 8-bit products", "infer.precision=auto"):
        predictor(trained().folder, precision="int8")


def test_a_model_without_plain_linear_layers_is_refused_in_int8():
    class Bare(torch.nn.Module):
        def get_base_model(self):
            return self

        def unload(self):
            return self

    with refuses("base-unsuitable", "infer.precision=int8: Bare", "infer.precision=auto"):
        raycv.model.int8.to_int8(Bare())


def test_a_criterion_longer_than_trainings_shortens_the_post(trained):
    fold = trained()
    long = " ".join(WORDS[:6])
    model = predictor(fold.folder)
    post = " ".join(WORDS)
    encoded, _ = model._encode([(post, long)])
    assert encoded.lengths.tolist() == [26]
    tokens = model.encoder.tokenizer.convert_ids_to_tokens(encoded.input_ids[0])
    question = ["criterion:", *WORDS[:6], "Does"]
    assert question in [tokens[start : start + len(question)] for start in range(len(tokens))]
    assert model.predict([(post, long)])[0].truncated
    with refuses("prompt-length", "prompt's 26 tokens", "shorten the criterion"):
        model.predict([(post, " ".join(WORDS * 3))])


@pytest.mark.parametrize(
    ("asked", "trained_in", "fast", "chosen"),
    [
        ("auto", "bf16", True, "bf16"),
        ("auto", "bf16", False, "fp32"),
        ("auto", "fp32", True, "fp32"),
        ("auto", "fp32", False, "fp32"),
        ("fp32", "bf16", True, "fp32"),
        ("bf16", "fp32", False, "bf16"),
        ("int8", "bf16", True, "int8"),
    ],
)
def test_precision(monkeypatch, asked, trained_in, fast, chosen):
    """auto is what training computed in, where the device is fast at it; never int8."""
    monkeypatch.setattr(raycv.inference.predictor, "has_fast_bf16", lambda: fast)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: fast)
    assert choose_precision(asked, trained_in, CPU) == chosen
    assert choose_precision(asked, trained_in, GPU) == chosen


@pytest.mark.parametrize(
    "changes",
    [{"criteria_hash": "other"}, {"base_revision": "other"}, {"rules": None}],
    ids=lambda each: next(iter(each)),
)
def test_checkpoints_of_different_runs_are_refused(trained, tmp_path, changes):
    fold = trained()
    if "rules" in changes:
        changes = {"rules": replace(fold.info.rules, max_length=40)}
    other = fold.rewritten(tmp_path / "other", **changes)
    with refuses("checkpoint-damaged", f"{other} ", f"{fold.folder}: its {next(iter(changes))} "):
        predictor(fold.folder, other)


def test_a_probability_that_is_no_number_is_never_answered(trained):
    model = predictor(trained().folder)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.fill_(float("nan"))
    with refuses("training-loss", "NaN or infinity", "infer.precision=fp32"):
        model.predict(trained().pairs()[:2])


@pytest.mark.long
def test_a_model_whose_attention_is_capped_scores_as_in_training_and_says_so(tmp_path):
    toy = Toy(toy_base(tmp_path, tiny_gemma2))
    model = toy.model(dropout=0.1)
    expected = FoldTrainer(model, toy.encoded, train_config(epochs=1), "fp32", Recorder()).fit(TRAIN, VAL).val_scores
    dataset = toy.dataset
    pairs = [
        (dataset.posts[pair.post_id], dataset.criteria[pair.criterion_id].text)
        for pair in (dataset.pairs[index] for index in VAL)
    ]
    capped = "attention is eager: attn_logit_softcapping=50 caps its scores, and PyTorch's kernel (sdpa) does not"
    alone = (
        "every pair is computed on its own: the eager attention of Gemma2ForSequenceClassification takes no mask of "
        "its own"
    )
    off = (
        "Warning: the checkpoint was trained with sdpa attention and is computed with eager: scores may be off, so "
        "train it again"
    )
    # The manifest of an earlier version names none.
    for attention, more in (("eager", []), (None, [off])):
        folder, told = tmp_path / str(attention), []
        save_checkpoint(folder, model, toy.tokenizer, toy.info(attention=attention))
        np.testing.assert_allclose(scores(predictor(folder, tell=told.append), pairs), expected, atol=1e-6)
        assert told == [capped, *more, alone]


def test_inference_computes_the_attention_of_training(trained, tmp_path):
    """A kernel that was found wrong in training, with longer prompts or elsewhere, is not taken for right here."""
    fold, told = trained(), []
    plain = predictor(fold.rewritten(tmp_path / "eager", attention="eager"), tell=told.append)
    assert attention_of(plain.model.get_base_model()) == "eager"
    assert told == [
        "every pair is computed on its own: the eager attention of LlamaForSequenceClassification takes no mask of its "
        "own"
    ]
    for attention in ("sdpa", None):
        told = []
        kernel = predictor(fold.rewritten(tmp_path / str(attention), attention=attention), tell=told.append)
        assert attention_of(kernel.model.get_base_model()) == "sdpa"
        assert told == []
