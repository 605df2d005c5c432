"""Shared prefixes: the logits and gradients of the plain path, on every mixture, and a way out where they are not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import tiny_bert
from torch import nn
from torch.nn import functional
from toy import Recorder, Toy, prompt_config, toy_base, toy_dataset, train_config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from raycv.base import fetch_base
from raycv.encoding import encode_dataset, prompt_encoder
from raycv.loading import load_classifier, load_tokenizer
from raycv.model import Float32Head
from raycv.prefix import common_prefix, grouped, pack
from raycv.sampling import epoch_order
from raycv.scoring import RowScorer
from raycv.train import FoldTrainer

CPU = torch.device("cpu")
TRAIN, VAL = np.arange(30), np.arange(30, 48)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy_base(tmp_path_factory.mktemp("toy"))


def disturbed(toy, dtype="float32"):
    """A model whose adapters do something: as trained, not as fresh."""
    model = toy.model(dtype=dtype)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def scorer(toy, model):
    import contextlib

    return RowScorer(model, toy.encoded, CPU, contextlib.nullcontext)


def both(toy, model, rows, size=36):
    compute = scorer(toy, model)
    with torch.no_grad():
        plain = {int(r): v for b in compute.batches(rows, size, share=False) for r, v in logits_of(compute, b, False)}
        shared_rows = compute.sorted(rows, share=True)
        shared = {
            int(r): v for b in compute.batches(shared_rows, size, share=True) for r, v in logits_of(compute, b, True)
        }
    assert plain.keys() == shared.keys() == {int(row) for row in rows}
    order = sorted(plain)
    return torch.stack([plain[row] for row in order]), torch.stack([shared[row] for row in order])


def logits_of(compute, batch, share):
    return zip(np.concatenate(batch), compute.logits(batch, share=share), strict=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("mode", ["head_tail", "head", "tail", "none", "sliding"])
@pytest.mark.parametrize("words", [5, 40])
def test_logits_are_those_of_the_plain_path(base, dtype, tolerance, mode, words):
    toy = Toy(base, toy_dataset(words=words), prompt_config(max_length=24, long_post=mode))
    model = disturbed(toy, dtype)
    if dtype == "float64":
        model = model.double()
    rows = np.arange(len(toy.encoded.lengths))
    plain, shared = both(toy, model, rows)
    torch.testing.assert_close(shared, plain, rtol=0, atol=tolerance)
    assert plain.std() > 1e-3


@pytest.mark.parametrize("mode", ["none", "head_tail", "sliding"])
def test_a_text_may_hold_the_token_that_pads(base, mode):
    """Here <unk>. Hugging Face's head reads the last other one: in a prompt cut within the post, one of the prefix."""
    dataset = toy_dataset()
    unknown = {post: " ".join(["w1"] * index + ["weird"] * 40) for index, post in enumerate(dataset.posts)}
    toy = Toy(base, replace(dataset, posts=unknown), prompt_config(max_length=24, long_post=mode))
    rows = np.arange(len(toy.encoded.lengths))
    assert (toy.encoded.input_ids[rows, toy.encoded.lengths - 1] == toy.encoded.pad_id).any() == (mode == "none")
    plain, shared = both(toy, disturbed(toy), rows)
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)
    assert plain.std() > 1e-3


@pytest.mark.parametrize("size", [1, 2, 4, 7, 100])
def test_any_mixture_of_posts_and_criteria_and_batch_sizes(base, size):
    toy = Toy(base)
    rows = np.random.default_rng(size).permutation(48)[:29]
    plain, shared = both(toy, disturbed(toy), rows, size)
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def nine(base):
    """Nine criteria a post, of which post k keeps the last k + 1: rows of posts with one to nine."""
    toy = Toy(base, toy_dataset(posts=9, words=30, criteria=9))
    posts = toy.encoded.post_of_pair
    rows = np.concatenate([np.flatnonzero(posts == post)[-(post + 1) :] for post in range(9)])
    assert sorted(np.bincount(posts[rows])) == list(range(1, 10))
    return toy, rows


@pytest.mark.parametrize("size", [1, 3, 50])
def test_posts_with_one_to_nine_criteria(nine, size):
    toy, rows = nine
    plain, shared = both(toy, disturbed(toy).double(), np.random.default_rng(0).permutation(rows), size)
    torch.testing.assert_close(shared, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_gradients_over_one_to_nine_criteria_are_those_without_sharing_in_float64(nine, checkpointing, monkeypatch):
    # Head and norms compute in float32 whatever they are given, and that would hide all below 1e-6.
    monkeypatch.setattr(Float32Head, "forward", nn.Linear.forward)
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda norm, x: functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon),
    )
    toy, rows = nine
    gradients = []
    for share in (True, False):
        config = train_config(batching="post_grouped", share_prefix=share, gradient_checkpointing=checkpointing)
        loop = FoldTrainer(disturbed(toy).double(), toy.encoded, config, "fp32", Recorder())
        assert loop.share[True] == share
        loop.class_weights = loop.class_weights.double()
        loop.model.train()
        loop._step(rows, training=True)
        gradients.append({name: p.grad for name, p in loop.model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


def test_each_row_keeps_a_token_of_its_own():
    one, two = np.array([5, 6, 7]), np.array([5, 6])
    assert common_prefix([one, two]) == 1
    assert common_prefix([one, one]) == 2
    assert common_prefix([one]) == 2
    assert common_prefix([np.array([4]), np.array([4])]) == 0
    packed = pack([[one, two], [np.array([9])]], pad_id=0, device=CPU)
    assert packed.input_ids.tolist() == [[5, 6, 7, 6], [9, 0, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 1], [0, 0, 0, 0]]
    assert packed.ends.tolist() == [[0, 2], [0, 3], [1, 0]]
    assert packed.mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # Groups of 16, 14 and 20: the third would leave a sixth of the batch as padding.
        (100, [[[0, 1, 2], [3, 4]], [[5, 6, 7, 8, 9]]]),
        (32, [[[0, 1, 2], [3, 4]], [[5, 6, 7, 8, 9]]]),
        (20, [[[0, 1, 2]], [[3, 4]], [[5, 6, 7, 8, 9]]]),
        (16, [[[0, 1, 2]], [[3, 4]], [[5, 6, 7]], [[8, 9]]]),
        (12, [[[0]], [[1]], [[2]], [[3]], [[4]], [[5]], [[6]], [[7]], [[8]], [[9]]]),
    ],
)
def test_groups_stay_whole_where_they_fit(budget, expected):
    group_of_row = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    lengths = np.full(10, 12)
    prefixes = np.array([10, 10, 10])
    batches = grouped(np.arange(10), group_of_row, lengths, prefixes, budget)
    assert [[part.tolist() for part in batch] for batch in batches] == expected


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_shared_batch_computes_no_more_positions_than_a_plain_one_may(base, size):
    toy = Toy(base, toy_dataset(words=25))
    compute = scorer(toy, None)
    rows = compute.sorted(np.random.default_rng(size).permutation(48)[:40], share=True)
    batches = list(compute.batches(rows, size, share=True))
    assert np.concatenate([part for batch in batches for part in batch]).tolist() == rows.tolist()
    for batch in batches:
        groups = [[toy.encoded.input_ids[row, : toy.encoded.lengths[row]] for row in part] for part in batch]
        assert pack(groups, 0, CPU).input_ids.numel() <= size * toy.encoded.lengths[rows].max()


def test_fewer_tokens_are_computed(base):
    toy = Toy(base, toy_dataset(words=25))
    groups = [[toy.encoded.input_ids[row, : toy.encoded.lengths[row]] for row in range(3)]]
    packed = pack(groups, 0, CPU)
    assert packed.input_ids.shape[1] < 0.75 * sum(len(row) for row in groups[0])


def test_gradients_of_a_post_grouped_step_are_those_without_sharing(base):
    toy = Toy(base)
    gradients, losses = [], []
    for share in (True, False):
        model = disturbed(toy)
        loop = FoldTrainer(
            model, toy.encoded, train_config(batching="post_grouped", share_prefix=share), "fp32", Recorder()
        )
        assert loop.share == {True: share, False: share}
        loop.model.train()
        losses.append(loop._step(TRAIN[3:17], training=True)[0])
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)


def test_post_grouped_order_keeps_posts_together_and_shuffles_them(base):
    toy = Toy(base)
    loop = FoldTrainer(toy.model(), toy.encoded, train_config(batching="post_grouped"), "fp32", Recorder())
    first, second = (epoch_order(loop.config, toy.encoded, TRAIN, epoch) for epoch in (1, 2))
    assert sorted(first) == sorted(second) == TRAIN.tolist()
    posts = toy.encoded.post_of_pair
    for order in (first, second):
        assert (np.diff(posts[order]) != 0).sum() == len(set(posts[TRAIN].tolist())) - 1
    assert first.tolist() != second.tolist()
    assert loop.fit(TRAIN, VAL).epochs[0].train_loss > 0


def test_validation_shares_by_default_and_scores_alike(base):
    toy = Toy(base)
    model = disturbed(toy)
    shared = FoldTrainer(model, toy.encoded, train_config(), "fp32", Recorder())
    plain = FoldTrainer(model, toy.encoded, train_config(share_prefix=False), "fp32", Recorder())
    assert shared.share == {True: False, False: True}
    np.testing.assert_allclose(shared.scores(VAL)[0], plain.scores(VAL)[0], atol=1e-6)
    assert shared.scores(VAL)[1] == pytest.approx(plain.scores(VAL)[1], rel=1e-5)


def test_a_model_that_is_not_causal_falls_back_and_says_so(tmp_path):
    files = fetch_base(str(tiny_bert(tmp_path)), None)
    tokenizer = load_tokenizer(files)
    dataset = toy_dataset()
    encoder = prompt_encoder(tokenizer, prompt_config(), [c.text for c in dataset.criteria.values()])
    encoded, _ = encode_dataset(encoder, dataset)
    model = load_classifier(files, tokenizer, torch.float32, seed=1)
    recorder = Recorder()
    loop = FoldTrainer(model, encoded, train_config(), "fp32", recorder)
    assert loop.share == {True: False, False: False}
    assert "every prompt is computed on its own: BertForSequenceClassification" in recorder.events[0]


@pytest.mark.parametrize("size", [1, 1e-4])
def test_a_llama_that_looks_both_ways_is_found_out(base, monkeypatch, size):
    """The shape is right, the model is not causal: only the logits tell, though a fresh head's be small."""
    toy = Toy(base)
    model = disturbed(toy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "score.modules_to_save" in name:
                parameter.mul_(size)
    assert scorer(toy, model).check_sharing() is None
    backbone = model.get_base_model().model
    real = backbone.forward

    def both_ways(input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is None or attention_mask.dim() == 2:
            keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = (keep[:, None, None, :] > 0).expand(-1, 1, input_ids.shape[1], -1)
        return real(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(backbone, "forward", both_ways)
    assert "is not causal: its logits differ by" in scorer(toy, model).check_sharing()


@pytest.mark.parametrize(("window", "shares"), [(8, False), (4096, True), (None, True)])
def test_a_short_attention_window_is_not_shared(tmp_path, window, shares):
    """transformers drops the window where it is given a mask: longer posts would silently get other logits."""
    files = toy_base(tmp_path)
    config = json.loads((files.path / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    (files.path / "config.json").write_text(json.dumps(config))
    toy = Toy(fetch_base(str(files.path), None))
    trouble = scorer(toy, disturbed(toy)).check_sharing()
    assert (trouble is None) == shares
    if not shares:
        assert f"sees 8 tokens, and prompts have {toy.encoded.lengths.max()}" in trouble


@pytest.mark.parametrize(("trained", "shares"), [(8, False), (4096, True)])
def test_positions_that_depend_on_the_batch_are_not_shared(tmp_path, trained, shares):
    """Beyond its first length, dynamic scaling turns with the longest prompt that is computed at once."""
    files = toy_base(tmp_path)
    config = json.loads((files.path / "config.json").read_text())
    config |= {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": trained}
    (files.path / "config.json").write_text(json.dumps(config))
    toy = Toy(fetch_base(str(files.path), None), prompt=prompt_config(max_length=24))
    trouble = scorer(toy, disturbed(toy)).check_sharing()
    assert (trouble is None) == shares
    if not shares:
        assert "beyond 8 tokens LlamaForSequenceClassification embeds positions by the longest prompt" in trouble


def test_layers_that_take_no_mask_of_ours_are_not_shared(base, monkeypatch):
    """As those of Jamba that are no attention. Out of memory is told from that."""
    toy = Toy(base)
    model = disturbed(toy)
    backbone, real = model.get_base_model().model, model.get_base_model().model.forward
    error = RuntimeError("Expected 2D or 3D input to conv1d")

    def picky(input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise error
        return real(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(backbone, "forward", picky)
    assert "does not take a mask of its own: RuntimeError: Expected 2D" in scorer(toy, model).check_sharing()
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        scorer(toy, model).check_sharing()


def test_the_check_looks_at_the_longest_post_and_at_two_rows_of_it(base):
    toy = Toy(base)
    compute = scorer(toy, disturbed(toy))
    seen = []

    def logits(batch, share):
        seen.append(np.concatenate(batch))
        return RowScorer.logits(compute, batch, share=share)

    compute.logits = logits
    assert compute.check_sharing() is None
    assert [len(rows) for rows in seen] == [1, 1, 2]
    assert toy.encoded.lengths[seen[2]].max() == toy.encoded.lengths.max()
