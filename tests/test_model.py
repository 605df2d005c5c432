"""Base -> classifier: what is trainable, in which type, and which architectures and modules are accepted."""

import json
import re

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLoraLinear
from support.builders import ARCHITECTURES, tiny_bert, tiny_gemma2, tiny_gemma3, tiny_llama, tiny_model
from support.refusals import refuses
from support.toy import LLAMA_MODULES
from transformers import AutoModelForSequenceClassification

from raycv.config.schema import DoraConfig, ModelConfig, PromptConfig
from raycv.data.prompt_encoder import encode_dataset, prompt_encoder
from raycv.data.types import Criterion, Dataset, Pair
from raycv.model.adapters import (
    Float32Head,
    add_dora,
    check_model,
    choose_precision,
    count_parameters,
    trainable,
)
from raycv.model.attention import attention_of, choose_attention, far_apart, in_plain_code
from raycv.model.base_model import fetch_base
from raycv.model.dora import factored_layers
from raycv.model.loading import check_max_length, load_classifier, load_config, load_tokenizer, prepare_config

DORA = DoraConfig(r=4, alpha=8, lora_dropout=0.0, dropout="lora_path", implementation="factored")


def classifier(folder, dtype=torch.float32):
    files = fetch_base(str(folder), None)
    return load_classifier(files, load_tokenizer(files), dtype, seed=1)


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def config(targets):
    return ModelConfig(name="here", revision=None, target_modules=targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_and_head_are_float32_whatever_the_base_is(tmp_path, dtype):
    model = add_dora(classifier(tiny_llama(tmp_path), dtype), config(LLAMA_MODULES), DORA)
    assert {parameter.dtype for parameter in trainable(model)} == {torch.float32}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert dtype in frozen
    heads = [module for module in model.modules() if isinstance(module, Float32Head)]
    assert heads
    assert all(head.weight.dtype == torch.float32 for head in heads)


def test_trainable_parameters_are_dora_on_the_seven_and_the_head(tmp_path):
    model = add_dora(classifier(tiny_llama(tmp_path, hidden=32, layers=2)), config(LLAMA_MODULES), DORA)
    shapes = [(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]
    expected = 2 * sum(4 * (out + inp) + out for out, inp in shapes) + 2 * 32
    assert count_parameters(model)["trainable_parameters"] == expected
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(part in name for name in names for part in ["lora_" if "lora_" in name else "modules_to_save"])


def test_the_untrained_classifier_is_the_base(tmp_path):
    """DoRA starts at B = 0 and magnitude = |W|: before training the adapted model computes what the base does."""
    base = classifier(tiny_llama(tmp_path))
    ids = torch.randint(3, 200, (2, 9))
    expected = base(input_ids=ids).logits
    adapted = add_dora(base, config(LLAMA_MODULES), DORA).eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "dropout", "p"),
    [("factored", "lora_path", 0.1), ("factored", "peft", 0.1), ("peft", "peft", 0.1), ("peft", "lora_path", 0.0)],
)
@pytest.mark.parametrize("architecture", ["Llama", "GPT2LMHeadModel"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_implementation_and_dropout_are_those_asked_for_in_every_layer(
    tmp_path, architecture, implementation, dropout, p
):
    """What each combination computes: `lora_path` keeps W x whole, `peft` drops it too, whoever computes it."""
    folder = tiny_llama(tmp_path / "a") if architecture == "Llama" else tiny_model(tmp_path / "a", architecture)
    dora = DoraConfig(r=4, alpha=8, lora_dropout=p, dropout=dropout, implementation=implementation)
    model = add_dora(classifier(folder), config("all-linear"), dora).train()
    layers = [module for module in model.modules() if isinstance(module, PeftLoraLinear)]
    assert len(layers) == {"Llama": 14, "GPT2LMHeadModel": 8}[architecture]
    assert len(factored_layers(model)) == (len(layers) if implementation == "factored" else 0)
    for layer in layers:
        x, base = torch.randn(5, layer.in_features), layer.get_base_layer()
        layer.lora_magnitude_vector["default"].weight.data *= 1.5
        bias = 0 if base.bias is None else base.bias
        # B is 0, so only dropout on the base path can change what the base gives.
        whole = torch.allclose(layer(x), 1.5 * (base(x) - bias) + bias, atol=1e-6)
        assert whole == (dropout == "lora_path" or p == 0)


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
def test_another_architecture_with_its_own_modules(tmp_path, targets):
    model = add_dora(classifier(tiny_bert(tmp_path)), config(targets), DORA)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("query" in name for name in names)
    assert any("dense.lora_" in name for name in names) == (targets == "all-linear")
    assert {"classifier", "pooler"} <= {part for name in names for part in name.split(".")}
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.long
def test_any_family_trains_and_opens_again_in_stock_peft(tmp_path, architecture, dtype):
    """Whatever is fresh (poolers, pre-classifiers, dense heads) is trained in full and saved, and gets no adapter."""
    base = classifier(tiny_model(tmp_path / "base", architecture), dtype)
    model = add_dora(base, config("all-linear"), DORA)
    ids = torch.tensor([[5, 6, 7, 8, 9, 2], [9, 8, 7, 6, 5, 2]])
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in trainable(model))
    assert not any("lora_" in name and "modules_to_save" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "checkpoint", save_embedding_layers=False)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2, dtype=dtype)
    stock.config.pad_token_id = base.config.pad_token_id
    reopened = PeftModel.from_pretrained(stock.float(), tmp_path / "checkpoint").eval()(input_ids=ids).logits
    expected = model.float().eval()(input_ids=ids).logits
    torch.testing.assert_close(reopened, expected, atol=1e-6, rtol=1e-5)


def test_the_head_depends_on_the_seed_alone(tmp_path):
    files = fetch_base(str(tiny_model(tmp_path, "BertForMaskedLM")), None)
    tokenizer = load_tokenizer(files)

    def head(seed, dtype):
        state = load_classifier(files, tokenizer, dtype, seed=seed).state_dict()
        return torch.cat([state[key].float().flatten() for key in ("classifier.weight", "bert.pooler.dense.weight")])

    torch.testing.assert_close(head(1, torch.float32), head(1, torch.bfloat16), atol=1e-3, rtol=1e-2)
    assert not torch.allclose(head(1, torch.float32), head(2, torch.float32))


def test_a_model_without_a_head_is_refused(tmp_path):
    from transformers import LlamaModel

    headless = LlamaModel.from_pretrained(tiny_llama(tmp_path))
    with refuses("base-unsuitable", "LlamaModel", "AutoModelForSequenceClassification"):
        add_dora(headless, config(LLAMA_MODULES), DORA)


def test_unknown_target_modules_are_refused_with_those_there_are(tmp_path):
    those_there_are = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with refuses("base-unsuitable", "model.target_modules: query, wq", those_there_are) as caught:
        add_dora(classifier(tiny_llama(tmp_path)), config(["q_proj", "query", "wq"]), DORA)
    assert "score" not in str(caught.value)


def test_precision_says_why():
    assert choose_precision("fp32")[0] == "fp32"
    if not torch.cuda.is_available():
        torch.manual_seed(3)
        before = torch.get_rng_state()
        precision, why = choose_precision("auto")
        # Its numbers must not depend on the machine, so a CPU that is faster in bf16 only says so.
        assert precision == "fp32"
        said = re.fullmatch(r"fp32: no GPU with bf16 support was found(; this CPU multiplies .* \S*=bf16 uses)?", why)
        assert said
        precision, why = choose_precision("bf16")
        assert precision == "bf16"
        found = re.fullmatch(r"bf16 autocast as asked; this CPU multiplies bf16 (\S+) times as fast as fp32", why)
        assert found
        assert float(found[1]) > 0
        assert torch.equal(torch.get_rng_state(), before), "a seed that is set gives the same numbers afterwards"


@pytest.mark.parametrize("layers", [1, -1])
def test_layers_that_the_config_leaves_out_are_refused(tmp_path, layers):
    """transformers only reports them: the model would answer with layers missing."""
    folder = tiny_llama(tmp_path, layers=3)
    change_config(folder, num_hidden_layers=layers, layer_types=None)
    with refuses("base-files", f"weights of {folder}", "config.json", "model.layers."):
        classifier(folder)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("GPT2LMHeadModel", "sdpa"), ("ModernBertForMaskedLM", "sdpa"), ("DebertaV2ForMaskedLM", "eager")],
)
def test_attention_is_pytorchs_whatever_is_installed(tmp_path, monkeypatch, architecture, expected):
    """ModernBERT would take flash_attn where that is installed, and DeBERTa has its own alone."""
    folder = tiny_model(tmp_path, architecture)
    monkeypatch.setattr(transformers.modeling_utils, "is_flash_attn_2_available", lambda: True)
    assert classifier(folder).config._attn_implementation == expected


def told_of(folder, dtype=torch.float32, **options):
    """The classifier of `folder`, and what its loading told."""
    files, told = fetch_base(str(folder), None), []
    return load_classifier(files, load_tokenizer(files), dtype, seed=1, tell=told.append, **options), told


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43)[None]).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_that_the_config_caps_are_capped(tmp_path, dtype):
    """PyTorch's kernel drops the cap of Gemma 2: another function, in silence."""
    model, told = told_of(tiny_gemma2(tmp_path), dtype)
    assert attention_of(model) == "eager"
    assert told == [
        "attention is eager: attn_logit_softcapping=50 caps its scores, and PyTorch's kernel (sdpa) does not"
    ]
    capped = logits_of(model)
    model.set_attn_implementation("sdpa")
    assert far_apart(capped, logits_of(model), torch.float32)


def test_a_cap_of_none_leaves_the_kernel(tmp_path):
    model, told = told_of(tiny_gemma2(tmp_path, cap=None))
    assert (attention_of(model), told) == ("sdpa", [])


def test_caps_are_found_in_parts_of_a_config_and_under_other_names():
    from transformers import Gemma2Config, LlamaConfig, T5GemmaConfig

    assert choose_attention(LlamaConfig()) == ("sdpa", None)
    for config in (Gemma2Config(), T5GemmaConfig(), LlamaConfig(attention_logit_cap=30.0)):
        assert choose_attention(config)[0] == "eager"
    for others in ({"final_logit_softcapping": 30.0}, {"attention_capacity": 2}, {"attn_logit_softcapping": None}):
        assert choose_attention(LlamaConfig(**others)) == ("sdpa", None)


@pytest.fixture
def kernel():
    """Puts another function in the place of sdpa, by its public interface, and takes it out again."""
    from transformers import AttentionInterface

    before = AttentionInterface()["sdpa"]

    def replace(change):
        AttentionInterface.register("sdpa", lambda *args, **kwargs: change(before, *args, **kwargs))

    yield replace
    AttentionInterface.register("sdpa", before)


def with_another_scale(real, module, query, key, value, mask, **options):
    return real(module, query, key, value, mask, **options | {"scaling": 0.01})


def with_sinks(real, module, query, key, value, mask, **options):
    """Each head keeps a part of what it found, as where a learned sink takes the rest."""
    parts = torch.linspace(0.1, 1.0, query.shape[1], dtype=query.dtype)
    return real(module, query, key, value, mask, **options)[0] * parts[:, None], None


def with_biases(real, module, query, key, value, mask, **options):
    """Of the distance, as ALiBi's."""
    places = torch.arange(key.shape[2])
    biases = 8.0 * (places[None, :] - places[-query.shape[2] :, None])
    seen = biases <= 0 if mask is None else mask
    return real(module, query, key, value, torch.where(seen, biases, float("-inf")).to(query.dtype), **options)


def without_padding(real, module, query, key, value, mask, **options):
    """Wrong only where there is a mask."""
    return real(module, query, key, value, None, **options | {"is_causal": mask is None})


def both_ways(real, module, query, key, value, mask, **options):
    """Wrong only where there is no mask."""
    return real(module, query, key, value, mask, **options | {"is_causal": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [with_another_scale, with_sinks, with_biases, without_padding, both_ways])
def test_a_kernel_that_computes_another_function_is_found_by_its_logits(tmp_path, kernel, wrong, dtype):
    """No config tells: a model whose attention matters, with a kernel that is wrong in silence."""
    folder = tiny_gemma2(tmp_path, cap=None)
    right, told = told_of(folder, dtype)
    assert (attention_of(right), told) == ("sdpa", [])
    expected = logits_of(right)
    kernel(wrong)
    model, told = told_of(folder, dtype)
    assert attention_of(model) == "eager"
    assert len(told) == 1
    assert told[0].startswith(
        "Warning: attention is eager, which is slower: with PyTorch's kernel (sdpa) the logits of"
    )
    assert far_apart(expected, logits_of(model), dtype) is None
    assert all(not tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    # It trains and is saved like any other.
    adapted = add_dora(model, config("all-linear"), DORA)
    adapted(input_ids=torch.arange(3, 43)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(adapted))


def test_a_window_that_the_kernel_forgets_is_found(tmp_path, kernel):
    """The prompt that is compared is longer than a short window."""
    folder = tiny_llama(tmp_path)
    windowed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 40}
    change_config(folder, **windowed, initializer_range=0.02)
    assert told_of(folder)[1] == []

    def forgetful(real, module, query, key, value, mask, **options):
        return real(module, query, key, value, None, **options | {"is_causal": True})

    kernel(forgetful)
    assert "the logits of MistralForSequenceClassification differ" in told_of(folder)[1][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.long
def test_the_comparison_is_made_for_any_family_and_finds_nothing(tmp_path, monkeypatch, architecture, dtype):
    """Those too that fix their attention when they are built (BERT), which the other model shares all tensors with."""
    import raycv.model.attention

    compared = []
    monkeypatch.setattr(raycv.model.attention, "far_apart", lambda *args: compared.append(args) or far_apart(*args))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, told = told_of(tiny_model(tmp_path, architecture), dtype)
    assert torch.get_rng_state().equal(before)
    assert told == []
    assert len(compared) == (2 if attention_of(model) == "sdpa" else 0)


def test_the_plain_model_holds_no_tensor_of_its_own(tmp_path):
    model = classifier(tiny_model(tmp_path, "RobertaForMaskedLM"))
    plain = in_plain_code(model)
    assert (attention_of(plain), attention_of(model)) == ("eager", "sdpa")
    for kind in ("parameters", "buffers"):
        own = {tensor.data_ptr() for tensor in getattr(model, kind)()}
        assert {tensor.data_ptr() for tensor in getattr(plain, kind)()} <= own


def test_a_family_that_cannot_be_compared_is_told_and_kept(tmp_path, kernel, monkeypatch):
    import raycv.model.attention

    def fails(model):
        raise error

    monkeypatch.setattr(raycv.model.attention, "in_plain_code", fails)
    error = ValueError("no eager here")
    model, told = told_of(tiny_llama(tmp_path))
    assert attention_of(model) == "sdpa"
    assert told == [
        "Warning: attention (sdpa) of LlamaForSequenceClassification was not compared with eager: "
        "ValueError: no eager here"
    ]
    error = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError):
        told_of(tmp_path)


def test_plain_attention_that_is_asked_for_is_taken(tmp_path):
    model, told = told_of(tiny_llama(tmp_path), plain_attention=True)
    assert (attention_of(model), told) == ("eager", [])


@pytest.mark.parametrize("set_before", [False, True])
def test_loading_leaves_the_tokenizer_as_it_was(tmp_path, set_before):
    """A fast tokenizer keeps the truncation of its last call, and saves it: checkpoints would change."""
    files = fetch_base(str(tiny_llama(tmp_path)), None)
    tokenizer = load_tokenizer(files)
    if set_before:
        tokenizer.backend_tokenizer.enable_truncation(7, stride=2, strategy="only_first", direction="left")
        tokenizer.backend_tokenizer.enable_padding(pad_id=0, pad_token="<unk>", length=9)
    before = tokenizer.backend_tokenizer.to_str()
    load_classifier(files, tokenizer, torch.float32, seed=1)
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"pad_token_id": 9999}, "AssertionError"),
        ({"hidden_act": "sillu"}, "KeyError"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
    ],
)
def test_a_config_that_describes_no_classifier_is_refused_in_words(tmp_path, change, cause):
    found = fetch_base(str(tiny_llama(tmp_path)), None)
    broken = load_config(found)
    for key, value in change.items():
        setattr(broken, key, value)
    with refuses("base-unsuitable", "config of here", cause, "config.json", "model.name="):
        check_model(broken, config(["q_proj"]))


def test_a_family_without_a_classifier_is_refused_by_its_name(tmp_path):
    found = fetch_base(str(tiny_llama(tmp_path)), None)
    change_config(tmp_path, model_type="clip_text_model")
    with refuses("base-unsuitable", "AutoModelForSequenceClassification", "model_type is 'clip_text_model'") as caught:
        check_model(load_config(found), config("all-linear"))
    assert len(str(caught.value)) < 400


def test_a_family_that_takes_whole_chunks_only_is_refused_by_its_name():
    with refuses("base-unsuitable", "model_type is 'reformer'", "model.name="):
        check_model(transformers.ReformerConfig(), config("all-linear"))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert, tiny_gemma3])
def test_a_config_that_asks_for_a_kernel_that_is_not_installed_is_taken(tmp_path, build, key):
    """raycv chooses the attention, in the preflight as in the worker."""
    folder = build(tmp_path)
    change_config(folder, **{key: "flash_attention_2"})
    files = fetch_base(str(folder), None)
    asking, tokenizer = load_config(files), load_tokenizer(files)
    assert prepare_config(asking, tokenizer) is None
    check_model(asking, config("all-linear"))
    assert attention_of(load_classifier(files, tokenizer, torch.float32, seed=1)) == "sdpa"


@pytest.mark.parametrize("targets", ["all-linear", LLAMA_MODULES])
def test_a_model_that_also_reads_images_trains_its_language_part_alone(tmp_path, targets):
    files = fetch_base(str(tiny_gemma3(tmp_path / "base")), None)
    asking, tokenizer = load_config(files), load_tokenizer(files)
    prepare_config(asking, tokenizer)
    check_model(asking, config(targets))
    check_max_length(asking, 512)
    with refuses("base-unsuitable", "prompt.max_length=513", "512 positions"):
        check_max_length(asking, 513)
    assert files.describe(tokenizer, asking)["vocab_size"] == len(tokenizer)
    model = add_dora(load_classifier(files, tokenizer, torch.float32, seed=1), config(targets), DORA)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapted = {name for name in names if ".lora_" in name}
    assert len(adapted) == 2 * 7 * 3
    assert all(".language_model.layers." in name for name in adapted)
    assert names - adapted == {"base_model.model.score.modules_to_save.default.weight"}
    # The logits of a row do not depend on its padding.
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, tokenizer.pad_token_id, tokenizer.pad_token_id]])
    mask = (ids != tokenizer.pad_token_id).long()
    padded = model.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[1], model(input_ids=ids[1:, :3]).logits[0])
    padded.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(model))
    model.save_pretrained(tmp_path / "checkpoint", save_embedding_layers=False)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2, dtype=torch.float32)
    stock.config.text_config.pad_token_id = tokenizer.pad_token_id
    reopened = PeftModel.from_pretrained(stock, tmp_path / "checkpoint").eval()
    torch.testing.assert_close(reopened(input_ids=ids, attention_mask=mask).logits, padded, atol=1e-6, rtol=1e-5)


def test_targets_that_only_the_part_for_images_has_are_refused(tmp_path):
    files = fetch_base(str(tiny_gemma3(tmp_path)), None)
    asking = load_config(files)
    prepare_config(asking, load_tokenizer(files))
    with refuses("base-unsuitable", "model.target_modules: fc1 ", "model.target_modules=all-linear") as caught:
        check_model(asking, config(["q_proj", "fc1"]))
    assert "out_proj" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_posts_that_spell_the_end_of_a_text_leave_the_end_where_it_is(tmp_path, architecture):
    """These pool at </s>: rows with unequal numbers of it failed, and others would be read at the wrong place."""
    base = fetch_base(str(tiny_model(tmp_path, architecture)), None)
    criteria = {f"C{i}": Criterion(f"C{i}", text) for i, text in enumerate(("trouble sleeping", "loss of interest"))}
    posts = {"p0": "I have not slept for days", "p1": "nothing</s> is </s> fun any more </s>"}
    data = Dataset(posts, criteria, [Pair(post, key, 0) for post in posts for key in criteria])
    prompt = PromptConfig(max_length=64, long_post="head_tail", head_fraction=0.25, stride_fraction=0.5)
    tokenizer = load_tokenizer(base)
    encoder = prompt_encoder(tokenizer, prompt, [each.text for each in criteria.values()])
    encoded, _ = encode_dataset(encoder, data)
    ids = torch.from_numpy(encoded.input_ids.astype("int64"))
    mask = (torch.arange(64)[None] < torch.from_numpy(encoded.lengths)[:, None]).long()
    model = load_classifier(base, tokenizer, torch.float32, seed=1)
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row in range(len(ids)):
        alone = model(input_ids=ids[row : row + 1, : encoded.lengths[row]]).logits
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-4)
