"""Small models and tokenizers in the real formats, for tests: same arguments, same bytes, well under a second each."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

SENTENCES = (
    "post: I have not slept for days, criterion: trouble sleeping Does the post match the criterion description?",
    "post: nothing is fun any more, criterion: loss of interest Output yes or no",
    "the cat sat on the mat and looked at the rain; tomorrow is another day",
    "I am tired all the time, I cannot eat and I cannot think",
    "she went for a run, then she made a cake for 12 people (it was great!)",
)
UNK, BOS, EOS = "<unk>", "<s>", "</s>"


def bpe_tokenizer(vocab: int = 320, texts: tuple[str, ...] = SENTENCES, pad: str | None = None) -> Any:
    """A fast byte-level BPE tokenizer of about `vocab` tokens that puts <s> first: ids 0 <unk>, 1 <s>, 2 </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [UNK, BOS, EOS] + ([pad] if pad else [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=pad
    )


def wordlevel_tokenizer(words: list[str], pad: str | None = None) -> Any:
    """A fast tokenizer with one token a word, split at white space: ids 0 <unk>, 1 <s>, 2 </s>, then `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [UNK, BOS, EOS, *([pad] if pad else []), *dict.fromkeys(words)]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=pad
    )


def sentencepiece_files(folder: Path, vocab: int = 400, texts: tuple[str, ...] = SENTENCES) -> Path:
    """Writes what a Llama repository of 2023 has: a sentencepiece BPE `tokenizer.model` and its config, no more."""
    import io
    import json

    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20),
        model_writer=model,
        vocab_size=vocab,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        # As Llama's: text goes in as it is, line breaks and all.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "legacy": True,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama_config(vocab: int, *, hidden: int = 32, layers: int = 2, heads: int = 4, positions: int = 1024) -> Any:
    """A Llama config like Llama-2's in all but size; no pad token."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * hidden,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def tiny_llama(
    path: Path,
    *,
    hidden: int = 32,
    layers: int = 2,
    tokenizer: Any = None,
    vocab: int | None = None,
    weights: str = "safetensors",
    shard: str = "1GB",
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Saves a seeded LlamaForCausalLM to `path` as the hub would have it, and `tokenizer` (default: `bpe_tokenizer()`).

    `weights` is safetensors or bin; `shard` the largest size of a file ("40KB" splits it); `tokenizer=False` writes
    none, and `vocab` is then the size of the vocabulary.
    """
    from transformers import LlamaForCausalLM

    chosen = bpe_tokenizer() if tokenizer is None else tokenizer
    config = llama_config(vocab or len(chosen), hidden=hidden, layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(path, safe_serialization=weights == "safetensors", max_shard_size=shard)
    if chosen:
        chosen.save_pretrained(path)
    return path


def tiny_gemma2(path: Path, tokenizer: Any = None, *, cap: float | None = 50.0) -> Path:
    """Saves a seeded Gemma2ForCausalLM whose scores reach the `cap` of its attention, and `tokenizer`, to `path`."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    chosen = tokenizer or bpe_tokenizer(pad="[PAD]")
    config = Gemma2Config(
        vocab_size=len(chosen),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=cap,
        initializer_range=1.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        Gemma2ForCausalLM(config).save_pretrained(path)
    chosen.save_pretrained(path)
    return path


def tiny_gemma3(path: Path, tokenizer: Any = None) -> Path:
    """Saves a seeded Gemma 3 that also reads images, whose text settings are in a part of the config, to `path`."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    chosen = tokenizer or bpe_tokenizer(pad="[PAD]")
    text = {
        "vocab_size": len(chosen),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(path)
    chosen.save_pretrained(path)
    return path


def tiny_bert(path: Path, *, hidden: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Saves a seeded BertForMaskedLM (so without a pooler) and a word-level tokenizer with [PAD] to `path`."""
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = wordlevel_tokenizer(" ".join(SENTENCES).split(), pad="[PAD]")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


ARCHITECTURES = (
    "BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "AlbertForMaskedLM", "DebertaV2ForMaskedLM",
    "ModernBertForMaskedLM", "GPT2LMHeadModel", "MistralForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM",
    "BartForConditionalGeneration", "T5ForConditionalGeneration",
)  # fmt: skip
"""Language models of many families, as researchers take them from the hub: none has a classification head."""


def tiny_model(path: Path, architecture: str, *, seed: int = 0) -> Path:
    """Saves a small seeded model of any of ARCHITECTURES, and a tokenizer that ends a text with </s>, to `path`."""
    import transformers
    from tokenizers import processors

    tokenizer = wordlevel_tokenizer(" ".join(SENTENCES).split(), pad="[PAD]")
    # Encoder-decoders pool at the end-of-text token.
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[(EOS, 2)])
    model_class = getattr(transformers, architecture)
    sizes = {
        "hidden_size": 32, "n_embd": 32, "dim": 32, "d_model": 32, "embedding_size": 16,
        "intermediate_size": 64, "hidden_dim": 64, "d_ff": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "num_hidden_layers": 2, "num_layers": 2, "n_layers": 2, "n_layer": 2, "encoder_layers": 2, "decoder_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "n_heads": 4, "num_heads": 4, "head_dim": 8,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_kv": 8, "max_position_embeddings": 128,
        "n_positions": 128, "cls_token_id": 1, "sep_token_id": 2, "decoder_start_token_id": 0,
    }  # fmt: skip
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    known = model_class.config_class()
    config = model_class.config_class(**tokens, **{key: size for key, size in sizes.items() if hasattr(known, key)})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model_class(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
NVIDIA_VERSION = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Fri Oct 15 12:55:40 UTC 2021
GCC version:  gcc version 9.3.0
"""


def files_of_a_gpu(root: Path, version: str = NVIDIA_VERSION) -> Path:
    """What NVIDIA's driver shows of itself below `root`, as on a machine with two GPUs."""
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (root / "dev" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "dev" / name).touch()
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").write_text(version)
    return root


def base_without_numbers(folder: Path) -> Path:
    """The tiny base that ships with raycv, copied into `folder` with weights that are all NaN: its training fails."""
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(Path(__file__).parents[2] / "models" / "tiny_llama", folder)
    weights = base / "model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    return base
