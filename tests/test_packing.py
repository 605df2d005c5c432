"""Packed prompts and shared prefixes: the logits and gradients of padded ones, on every mixture, and a way out."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import tiny_bert, tiny_gemma2
from support.toy import Recorder, Toy, prompt_config, toy_base, toy_dataset, train_config
from torch import nn
from torch.nn import functional
from transformers import Gemma3Config, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from raycv.data.prompt_encoder import encode_dataset, prompt_encoder
from raycv.model.adapters import Float32Head
from raycv.model.attention import ReadingLayer, attention_window, read_few
from raycv.model.base_model import fetch_base
from raycv.model.int8 import to_int8
from raycv.model.loading import load_classifier, load_tokenizer
from raycv.training.forward import Batch, RowScorer, in_order
from raycv.training.loop import FoldTrainer
from raycv.training.packing import Group, common_prefix, groups_of, in_lines, pack, steady_positions
from raycv.training.steps import epoch_order

CPU = torch.device("cpu")
TRAIN, VAL = np.arange(30), np.arange(30, 48)
LAYOUT = {"shuffled": "packed", "post_grouped": "shared"}


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


def positions(compute, batch):
    """Tokens that `batch` computes at most, padding included."""
    if batch.lines is None:
        return len(batch.rows) * compute.encoded.lengths[batch.rows].max()
    return len(batch.lines) * max(sum(group.positions for group in line) for line in batch.lines)


def logits_of(compute, rows, size, layout):
    with torch.no_grad():
        batches = list(compute.batches(compute.sorted(rows, layout), size, layout))
        return in_order(rows, [(batch.rows, compute.logits(batch)) for batch in batches])


def check_layouts(toy, model, rows, tolerance, size=36):
    """Packed and shared logits of `rows` are the padded ones."""
    compute = scorer(toy, model)
    padded = logits_of(compute, rows, size, "padded")
    assert padded.std() > 1e-3
    for layout in ("packed", "shared"):
        torch.testing.assert_close(logits_of(compute, rows, size, layout), padded, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("mode", ["head_tail", "head", "tail", "none", "sliding"])
@pytest.mark.parametrize("words", [5, 40])
def test_logits_are_those_of_the_plain_path(base, dtype, tolerance, mode, words):
    toy = Toy(base, toy_dataset(words=words), prompt_config(max_length=24, long_post=mode))
    model = disturbed(toy, dtype)
    if dtype == "float64":
        model = model.double()
    rows = np.arange(len(toy.encoded.lengths))
    check_layouts(toy, model, rows, tolerance)


@pytest.mark.parametrize("mode", ["none", "head_tail", "sliding"])
def test_a_text_may_hold_the_token_that_pads(base, mode):
    """Here <unk>. Hugging Face's head reads the last other one: in a prompt cut within the post, one of the prefix."""
    dataset = toy_dataset()
    unknown = {post: " ".join(["w1"] * index + ["weird"] * 40) for index, post in enumerate(dataset.posts)}
    toy = Toy(base, replace(dataset, posts=unknown), prompt_config(max_length=24, long_post=mode))
    rows = np.arange(len(toy.encoded.lengths))
    assert (toy.encoded.input_ids[rows, toy.encoded.lengths - 1] == toy.encoded.pad_id).any() == (mode == "none")
    check_layouts(toy, disturbed(toy), rows, 1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 100])
def test_any_mixture_of_posts_and_criteria_and_batch_sizes(base, size):
    toy = Toy(base)
    rows = np.random.default_rng(size).permutation(48)[:29]
    check_layouts(toy, disturbed(toy), rows, 1e-5, size)


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
    check_layouts(toy, disturbed(toy).double(), np.random.default_rng(0).permutation(rows), 1e-10, size)


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("batching", ["shuffled", "post_grouped"])
def test_gradients_over_one_to_nine_criteria_are_those_of_padding_in_float64(
    nine, batching, checkpointing, monkeypatch
):
    # Head and norms compute in float32 whatever they are given, and that would hide all below 1e-6.
    monkeypatch.setattr(Float32Head, "forward", nn.Linear.forward)
    monkeypatch.setattr(
        LlamaRMSNorm,
        "forward",
        lambda norm, x: functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon),
    )
    toy, rows = nine
    gradients = []
    for packing in (True, False):
        config = train_config(batching=batching, packing=packing, gradient_checkpointing=checkpointing)
        loop = FoldTrainer(disturbed(toy).double(), toy.encoded, config, "fp32", Recorder())
        assert loop.layout[True] == (LAYOUT[batching] if packing else "padded")
        loop.class_weights = loop.class_weights.double()
        loop.model.train()
        loop._step(rows, training=True)
        gradients.append({name: p.grad for name, p in loop.model.named_parameters() if p.requires_grad})
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


def computed_with(toy, model, layout, *, few, size=6):
    """Logits and gradients of all rows, and the positions that the last layer's MLP computes."""
    compute = scorer(toy, model)
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    last = classifier.model.layers[-1]
    assert type(last) is ReadingLayer
    last.__class__ = ReadingLayer if few else LlamaDecoderLayer
    counted = []
    hook = last.mlp.register_forward_pre_hook(lambda _, inputs: counted.append(inputs[0].shape[0] * inputs[0].shape[1]))
    rows = compute.sorted(np.arange(len(toy.encoded.lengths)), layout)
    batches = list(compute.batches(rows, size, layout))
    torch.manual_seed(5)
    made = [compute.logits(batch) for batch in batches]
    for logits in made:
        if logits.requires_grad:
            (logits * torch.arange(1, 3)).sum().backward()
    hook.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    last.__class__ = ReadingLayer
    return torch.cat(made), gradients, counted, batches


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_layer_computes_the_rows_that_are_read_alone(base, layout, checkpointing):
    toy = Toy(base)
    model = disturbed(toy).double()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for training in (False, True):  # the model has no dropout
        model.train(training)
        whole, gradients, all_positions, batches = computed_with(toy, model, layout, few=False)
        logits, few_gradients, few_positions, _ = computed_with(toy, model, layout, few=True)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)
        # The head and each adapter have a gradient, and it is that of the whole layer.
        assert few_gradients.keys() == gradients.keys() > set()
        for name, gradient in gradients.items():
            torch.testing.assert_close(few_gradients[name], gradient, rtol=1e-6, atol=1e-8, msg=name)
        most = [
            len(batch.lines) * max(sum(len(group.rows) for group in line) for line in batch.lines) for batch in batches
        ]
        passes = 1 + (training and checkpointing)
        assert sorted(few_positions) == sorted(most * passes)
        assert sum(few_positions) < sum(all_positions) / 2


def test_with_dropout_the_last_layer_draws_for_every_position_as_ever(base):
    toy = Toy(base)
    model = toy.model(dropout=0.2).train()
    whole, gradients, positions_before, _ = computed_with(toy, model, "packed", few=False)
    logits, few_gradients, positions_now, _ = computed_with(toy, model, "packed", few=True)
    assert positions_now == positions_before
    assert torch.equal(logits, whole)
    assert all(torch.equal(few_gradients[name], gradient) for name, gradient in gradients.items())


def test_in_int8_the_last_layer_computes_the_rows_that_are_read_alone(base):
    toy = Toy(base)
    model = disturbed(toy)
    whole, _, all_positions, _ = computed_with(toy, to_int8(model), "shared", few=False)
    logits, _, few_positions, _ = computed_with(toy, to_int8(disturbed(toy)), "shared", few=True)
    assert sum(few_positions) < sum(all_positions) / 2
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


def test_the_last_layer_of_other_families_is_theirs(tmp_path):
    files = fetch_base(str(tiny_gemma2(tmp_path)), None)
    model = load_classifier(files, load_tokenizer(files), torch.float32, seed=0)
    before = type(model.model.layers[-1])
    read_few(model)
    assert type(model.model.layers[-1]) is before


def test_on_another_device_than_a_cpu_the_last_layer_computes_every_position(base):
    toy = Toy(base)
    last = scorer(toy, disturbed(toy)).model.get_base_model().model.layers[-1]
    assert last.may_read()
    assert not last.to("meta").may_read()


def test_each_row_keeps_a_token_of_its_own():
    one, two = np.array([5, 6, 7]), np.array([5, 6])
    assert common_prefix([one, two]) == 1
    assert common_prefix([one, one]) == 2
    assert common_prefix([one]) == 2
    assert common_prefix([np.array([4]), np.array([4])]) == 0


def test_a_line_holds_groups_that_do_not_see_each_other():
    one, two, three = np.array([5, 6, 7]), np.array([5, 6]), np.array([8, 9])
    packed = pack([[[one, two], [three]], [[three]]], pad_id=0, device=CPU)
    assert packed.input_ids.tolist() == [[5, 6, 7, 6, 8, 9], [8, 9, 0, 0, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 1, 0, 1], [0, 1, 0, 0, 0, 0]]
    assert packed.ends.tolist() == [[0, 2], [0, 3], [0, 5], [1, 1]]
    assert packed.mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert packed.mask().any(dim=-1).all(), "a query that sees nothing would be NaN, padding too"


def attention(heads=4, keys=2, dtype=torch.float64, *, lines=((150, 290), (40, 3)), size=8):
    """Random queries, keys and values of two lines that hold long and short documents, and their mask."""
    generator = np.random.default_rng(0)
    rows = [[[generator.integers(1, 9, size=length)] for length in line] for line in lines]
    prefix = generator.integers(1, 9, size=120)
    rows[1] += [[np.append(prefix, generator.integers(1, 9, size=length)) for length in (20, 200)]]
    mask = pack(rows, pad_id=0, device=CPU).mask()
    torch.manual_seed(0)
    length = mask.shape[-1]
    # transformers makes them [B, L, H, D] and transposes them.
    made = [torch.randn(2, length, count, size, dtype=dtype).transpose(1, 2) for count in (heads, keys, keys)]
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = heads // keys, True
    return module, [states.requires_grad_() for states in made], mask


def attended(module, states, mask, **options):
    """The attention that a Llama computes with this mask, and the gradients of queries, keys and values."""
    torch.manual_seed(1)
    mixed, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *states, mask, scaling=0.5, **options)
    weights = torch.arange(mixed.numel(), dtype=mixed.dtype).view_as(mixed).sin()
    return mixed.detach(), torch.autograd.grad((mixed * weights).sum(), states)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_attention_of_each_document_on_its_own_is_that_of_the_whole_mask(heads, dtype, tolerance):
    module, states, mask = attention(*heads, dtype)
    # Another tensor with the same values has no note of the documents, so all of it is computed.
    whole, expected = attended(module, states, mask.clone())
    mixed, gradients = attended(module, states, mask)
    assert (mixed.shape, mixed.is_contiguous()) == (whole.shape, True)
    torch.testing.assert_close(mixed, whole, rtol=0, atol=tolerance)
    for gradient, of_whole in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, of_whole, rtol=tolerance, atol=tolerance)


def test_attention_computes_no_score_of_another_document_or_of_queries_far_ahead():
    module, states, mask = attention()
    # A score that the mask hides has weight 0, and 0 times NaN is NaN.
    states[2].data[0, :, 150:] = torch.nan
    assert attended(module, states, mask)[0][0, :150].isfinite().all()
    assert not attended(module, states, mask.clone())[0][0, :150].isfinite().any()
    module, states, mask = attention()
    states[2].data[0, :, 150 + 97 :] = torch.nan
    assert attended(module, states, mask)[0][0, 150 : 150 + 97].isfinite().all()


def test_dropout_of_attention_draws_as_in_transformers():
    module, states, mask = attention()
    (whole, _), (mixed, _) = (attended(module, states, each, dropout=0.3) for each in (mask.clone(), mask))
    assert torch.equal(mixed, whole)
    assert not torch.equal(mixed, attended(module, states, mask)[0])


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (20, [([0, 1, 2], 16), ([3, 4], 14), ([5, 6, 7, 8, 9], 20)]),
        (16, [([0, 1, 2], 16), ([3, 4], 14), ([5, 6, 7], 16), ([8, 9], 14)]),
        (12, [([row], 12) for row in range(10)]),
    ],
)
def test_groups_stay_whole_where_they_fit(budget, expected):
    group_of_row = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
    lengths, prefixes = np.full(10, 12), np.array([10, 10, 10])
    groups = groups_of(np.arange(10), group_of_row, lengths, prefixes, budget)
    assert [(group.rows.tolist(), group.positions) for group in groups] == expected


@pytest.mark.parametrize(
    ("sizes", "budget", "fill", "expected"),
    [
        ([9, 5, 4, 3, 1], 18, 0, [[[9], [5, 4]], [[3], [1]]]),
        ([9, 8, 1, 1], 18, 0, [[[9], [8, 1]], [[1]]]),
        # The fuller line takes what fits both.
        ([9, 6, 5, 3], 27, 0, [[[9], [6, 3], [5]]]),
        # 23 of 27 positions are less than nine tenths, and 18 of 18 are not.
        ([9, 6, 5, 3], 27, 0.9, [[[9], [6, 3]], [[5]]]),
        ([9, 2], 99, 0.9, [[[9]], [[2]]]),
        ([3, 3, 3], 7, 0.9, [[[3], [3]], [[3]]]),
        ([], 7, 0.9, []),
    ],
)
def test_lines_are_filled_with_the_largest_that_fit(sizes, budget, fill, expected):
    groups = [Group(np.array([index]), size) for index, size in enumerate(sizes)]
    batches = list(in_lines(groups, budget, fill))
    assert [[[group.positions for group in line] for line in batch] for batch in batches] == expected
    rows = [int(group.rows[0]) for batch in batches for line in batch for group in line]
    assert sorted(rows) == list(range(len(sizes)))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(40, 400),
    st.sampled_from([0, 0.5, 0.9, 1]),
)
def test_every_group_is_in_one_line_and_no_batch_passes_the_budget(sizes, budget, fill):
    groups = [Group(np.array([index]), size) for index, size in enumerate(sizes)]
    seen = []
    for batch in in_lines(groups, budget, fill):
        used = [sum(group.positions for group in line) for line in batch]
        assert all(used)
        assert len(used) * max(used) <= budget
        assert sum(used) >= fill * len(used) * max(used)
        seen += [int(group.rows[0]) for line in batch for group in line]
    assert sorted(seen) == list(range(len(sizes)))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_batch_computes_no_more_positions_than_so_many_of_the_longest(base, size, layout):
    toy = Toy(base, toy_dataset(words=25))
    computed = []
    model = toy.model()
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].numel()))
    compute = scorer(toy, model)
    rows = compute.sorted(np.random.default_rng(size).permutation(48)[:40], layout)
    batches = list(compute.batches(rows, size, layout))
    assert sorted(np.concatenate([batch.rows for batch in batches])) == sorted(rows)
    for batch in batches:
        compute.logits(batch)
        assert computed[-1] <= positions(compute, batch) <= size * toy.encoded.lengths[rows].max()
        assert layout == "shared" or computed[-1] == positions(compute, batch)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_of_no_rows_there_are_no_batches(base, layout):
    """As of the second of two workers, in a last step of one row."""
    toy = Toy(base)
    compute = scorer(toy, toy.model())
    rows = compute.sorted(np.array([5]), layout)
    places = [SimpleNamespace(rank=rank, size=2) for rank in range(2)]
    parts = [rows[compute.part(rows, place, layout)] for place in places]
    assert [len(list(compute.batches(part, 4, layout))) for part in parts] == [1, 0]


def test_logits_come_back_in_the_order_of_the_rows():
    """A row may be there twice: weighted sampling draws with replacement."""
    rows = np.array([7, 3, 7, 1])
    logits = [torch.tensor([[1.0, 1], [7, 7]]), torch.tensor([[7.0, 7], [3, 3]])]
    back = in_order(rows, list(zip([np.array([1, 7]), np.array([7, 3])], logits, strict=True)))
    assert back[:, 0].tolist() == rows.tolist()


def test_fewer_tokens_are_computed(base):
    toy = Toy(base, toy_dataset(words=25))
    groups = [[toy.encoded.input_ids[row, : toy.encoded.lengths[row]] for row in range(3)]]
    packed = pack([groups], 0, CPU)
    assert packed.input_ids.shape[1] < 0.75 * sum(len(row) for row in groups[0])


@pytest.mark.parametrize("imbalance", ["weighted_loss", "weighted_sampling"])
@pytest.mark.parametrize("long_post", ["head_tail", "sliding"])
def test_gradients_of_a_shuffled_step_are_those_of_padding(base, imbalance, long_post):
    """Windows of long posts and pairs that are drawn twice included."""
    toy = Toy(base, toy_dataset(words=30), prompt_config(max_length=24, long_post=long_post))
    config = train_config(imbalance=imbalance)
    pairs = epoch_order(config, toy.encoded, TRAIN, epoch=1)[:17]
    assert (len(set(pairs.tolist())) < len(pairs)) == (imbalance == "weighted_sampling")
    steps = []
    for packing in (True, False):
        model = disturbed(toy)
        loop = FoldTrainer(model, toy.encoded, config.model_copy(update={"packing": packing}), "fp32", Recorder())
        loop.model.train()
        loss, rows, logits = loop._step(pairs, training=True)
        assert len(loop.scorer.encoded.rows_of(pairs)) == len(rows) == len(logits)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        steps.append((float(loss), rows.tolist(), logits, gradients))
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-6)
    assert steps[0][1] == steps[1][1]
    torch.testing.assert_close(steps[0][2], steps[1][2], rtol=0, atol=1e-5)
    for name, gradient in steps[0][3].items():
        torch.testing.assert_close(gradient, steps[1][3][name], rtol=1e-3, atol=1e-6)


def test_gradients_of_a_post_grouped_step_are_those_of_padding(base):
    toy = Toy(base)
    gradients, losses = [], []
    for packing in (True, False):
        model = disturbed(toy)
        loop = FoldTrainer(
            model, toy.encoded, train_config(batching="post_grouped", packing=packing), "fp32", Recorder()
        )
        loop.model.train()
        losses.append(float(loop._step(TRAIN[3:17], training=True)[0]))
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


def test_training_packs_and_validation_shares_by_default_and_scores_alike(base):
    toy = Toy(base)
    model = disturbed(toy)
    shared = FoldTrainer(model, toy.encoded, train_config(), "fp32", Recorder())
    plain = FoldTrainer(model, toy.encoded, train_config(packing=False), "fp32", Recorder())
    assert shared.layout == {True: "packed", False: "shared"}
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
    assert loop.layout == {True: "padded", False: "padded"}
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
    assert scorer(toy, model).check_packing() is None
    backbone = model.get_base_model().model
    real = backbone.forward

    def both_ways(input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is None or attention_mask.dim() == 2:
            keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = (keep[:, None, None, :] > 0).expand(-1, 1, input_ids.shape[1], -1)
        return real(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(backbone, "forward", both_ways)
    assert "is not causal: its logits differ by" in scorer(toy, model).check_packing()


@pytest.mark.parametrize(("window", "shares"), [(8, False), (4096, True), (None, True)])
def test_a_short_attention_window_is_not_shared(tmp_path, window, shares):
    """transformers drops the window where it is given a mask: longer posts would silently get other logits."""
    files = toy_base(tmp_path)
    config = json.loads((files.path / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    (files.path / "config.json").write_text(json.dumps(config))
    toy = Toy(fetch_base(str(files.path), None))
    trouble = scorer(toy, disturbed(toy)).check_packing()
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
    trouble = scorer(toy, disturbed(toy)).check_packing()
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
    assert "does not take a mask of its own: RuntimeError: Expected 2D" in scorer(toy, model).check_packing()
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        scorer(toy, model).check_packing()


def test_the_check_looks_at_the_longest_post_and_at_two_rows_of_it(base):
    toy = Toy(base)
    compute = scorer(toy, disturbed(toy))
    seen = []

    def logits(batch):
        seen.append(batch)
        return RowScorer.logits(compute, batch)

    compute.logits = logits
    assert compute.check_packing() is None
    assert [len(batch.rows) for batch in seen] == [1, 1, 1, 3]
    (line,) = seen[-1].lines
    assert [len(group.rows) for group in line] == [2, 1]
    assert toy.encoded.lengths[seen[-1].rows].max() == toy.encoded.lengths.max()


def test_posts_with_one_criterion_are_packed_too(base):
    toy = Toy(base, toy_dataset(criteria=1))
    assert np.bincount(toy.encoded.post_of_pair).max() == 1
    loop = FoldTrainer(disturbed(toy), toy.encoded, train_config(), "fp32", Recorder())
    assert loop.layout == {True: "packed", False: "shared"}
    check_layouts(toy, disturbed(toy), np.arange(len(toy.encoded.labels)), 1e-5)


def test_positions_that_go_on_within_a_line_are_found_out(base, monkeypatch):
    """As of a model that takes no positions: right for a padded row, wrong for the second one of a line."""
    toy = Toy(base)
    model = disturbed(toy)
    backbone = model.get_base_model().model
    real = backbone.forward
    monkeypatch.setattr(
        backbone, "forward", lambda *args, position_ids=None, **kwargs: real(*args, position_ids=None, **kwargs)
    )
    assert "its logits differ by" in scorer(toy, model).check_packing()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("batching", ["shuffled", "post_grouped"])
def test_the_heaviest_batch_has_as_many_positions_as_any_of_training(base, batching, packing):
    """Two of the longest row fill a batch of two; two posts of them do not, and shorter ones fill it better."""
    toy = Toy(base, toy_dataset(words=25))
    config = train_config(batching=batching, batch_size=2, packing=packing)
    loop = FoldTrainer(toy.model(), toy.encoded, config, "fp32", Recorder())
    heaviest = positions(loop.scorer, loop._heaviest(TRAIN, 2))
    assert heaviest == 2 * toy.encoded.lengths[TRAIN].max()
    loop._choose_checkpointing(TRAIN)
    for epoch in range(20):
        order = epoch_order(config, toy.encoded, TRAIN, epoch)
        for start in range(0, len(order), config.effective_batch_size):
            rows = loop.scorer.sorted(order[start : start + config.effective_batch_size], loop.layout[True])
            for batch in loop.scorer.batches(rows, config.batch_size, loop.layout[True]):
                assert positions(loop.scorer, batch) <= heaviest


@pytest.mark.parametrize(("length", "widest"), [(295, 1024), (2000, 4000)])
def test_a_post_under_hundreds_of_criteria_is_no_line_of_its_own(length, widest):
    """Attention and its mask would grow with the square of it."""
    rows = np.arange(400)
    groups = list(groups_of(rows, np.zeros(400, int), np.full(400, length), np.array([length - 45]), 64 * length))
    assert np.concatenate([group.rows for group in groups]).tolist() == rows.tolist()
    assert widest - 45 < groups[0].positions <= widest
    assert max(group.positions for group in groups) <= widest


def test_windows_and_positions_of_a_model_for_images_are_those_of_its_text():
    text = {"num_hidden_layers": 1, "sliding_window": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert attention_window(Gemma3Config(text_config=text)) == 8
    assert steady_positions(Gemma3Config(text_config={**text, "max_position_embeddings": 64})) == 64


def test_windows_and_positions_that_other_families_name_otherwise():
    assert attention_window(LlamaConfig(attention_chunk_size=16)) == 16
    scaled = LlamaConfig(max_position_embeddings=64)
    assert steady_positions(scaled) is None
    scaled.rope_scaling = {"rope_type": "longrope", "original_max_position_embeddings": 32}
    assert steady_positions(scaled) == 32


def test_the_check_is_made_without_dropout_and_leaves_the_model_training(base):
    toy = Toy(base)
    model = toy.model(dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    assert scorer(toy, model.train()).check_packing() is None
    assert model.training


def test_a_model_whose_attention_is_capped_is_padded_and_its_padding_changes_nothing(tmp_path):
    """Gemma 2: PyTorch's kernel drops the cap, and the plain code takes no mask of a packed line."""
    toy = Toy(toy_base(tmp_path, tiny_gemma2))
    model, recorder = disturbed(toy), Recorder()
    loop = FoldTrainer(model, toy.encoded, train_config(), "fp32", recorder)
    assert loop.scorer.attention == "eager"
    assert loop.layout == {True: "padded", False: "padded"}
    assert recorder.events == [
        "every prompt is computed on its own: the eager attention of Gemma2ForSequenceClassification takes no mask of "
        "its own"
    ]
    rows = np.arange(len(toy.encoded.lengths))
    assert len(set(toy.encoded.lengths.tolist())) > 1
    with torch.no_grad():
        model.eval()
        together = loop.scorer.logits(Batch(rows))
        alone = torch.cat([loop.scorer.logits(Batch(rows[[row]])) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    result = loop.fit(TRAIN, VAL)
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
