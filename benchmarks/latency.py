"""Seconds of one answer by a 7B on this CPU, beside the floor that its products set: bf16 and int8.

Llama-7B's real shapes with random weights (nothing is downloaded), DoRA r=8 on the seven projections, computed by
raycv's own classes. The floor of T tokens is 2 N T over the rate of the products alone: N weights in the projections,
their products timed on the model's own weights, layer after layer, in turn with the whole forward. Where memory is
short a stack of fewer layers is measured and extrapolated linearly, and the result says so.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import CRITERIA
from benchmarks.harness import RESULTS, Bar, Clock, Result, add_one_core, clock, interleaved, parser, spread
from benchmarks.models import LLAMA_7B, PROJECTIONS, Shape, classifier
from raycv.common.files import read_json
from raycv.config.schema import DoraConfig, ModelConfig
from raycv.data.prompt_encoder import EncodedPairs
from raycv.model.adapters import add_dora
from raycv.model.dora import prepared
from raycv.model.int8 import Int8Linear, to_int8
from raycv.training.forward import RowScorer

SMALL = Shape(hidden=64, intermediate=172, heads=4, layers=3)
CPU = torch.device("cpu")
PRODUCT_LAYERS = 4
"""Layers whose products are timed: their weights are far larger than any cache."""
RESERVE = 3e9
"""Bytes of memory that stay free beside the weights."""
BAR = 1.3
PROFILED = 256
BUDGET = 1.0
"""Seconds: SC-004."""
PRODUCTS = {"aten::addmm", "aten::mm", "aten::linear", "aten::mkldnn_linear", "aten::_int_mm"}
ATTENTION = {"aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"}
CASTS = {"aten::copy_", "aten::_to_copy"}


def fitting(shape: Shape, most: int | None = None) -> Shape:
    """`shape` with as many layers as fit into the free memory in bf16, and at most `most`."""
    layer = 2 * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
    free = _available() - RESERVE - 2 * 2 * shape.vocab * shape.hidden
    return replace(shape, layers=max(1, min(most or shape.layers, shape.layers, int(free // (layer * 1.02)))))


def _available() -> int:
    """Bytes that processes may still take, the page cache among them."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(lines.partition("MemAvailable:")[2].split()[0]) * 1024


def random_model(shape: Shape) -> Any:
    """A bf16 classifier of `shape` under raycv's DoRA, in evaluation mode; every weight and adapter is random."""
    with torch.device("meta"):
        model = classifier(shape, seed=0, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    # Drawing 6.6e9 numbers takes minutes: one pool, many times.
    pool = torch.randn(shape.hidden * max(shape.intermediate, shape.vocab)).mul_(0.02).bfloat16()
    for parameter in model.parameters():
        parameter.data.copy_(pool[: parameter.numel()].view_as(parameter))
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            nn.init.ones_(module.weight)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffer was on meta too
    dora = DoraConfig(r=8, alpha=16, lora_dropout=0.05, dropout="lora_path", implementation="factored")
    adapted = add_dora(model.eval(), ModelConfig(name="random", revision=None, target_modules=PROJECTIONS), dora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return adapted.eval()


def prompts(vocab: int, prefix: int, suffix: int, criteria: int) -> EncodedPairs:
    """A post of `prefix` random tokens under `criteria` continuations of `suffix`."""
    generator = np.random.default_rng(0)
    ids = generator.integers(3, vocab, size=(criteria, prefix + suffix), dtype=np.int32)
    ids[:, :prefix] = ids[0, :prefix]
    ids[:, prefix] = np.arange(3, 3 + criteria)  # the continuations differ from their first token on
    return EncodedPairs(
        ids, np.full(criteria, prefix + suffix, dtype=np.int32), np.arange(criteria, dtype=np.int32),
        np.zeros(criteria, dtype=np.int64), np.zeros(criteria, dtype=np.int32), pad_id=0,
    )  # fmt: skip


def inputs(*, small: bool) -> dict[str, tuple[EncodedPairs, int]]:
    """What is answered, and how many positions it takes: single prompts, and a median post under nine criteria."""
    vocab = SMALL.vocab if small else LLAMA_7B.vocab
    found = {
        f"one pair, {tokens} tokens": (prompts(vocab, tokens - 8, 8, 1), tokens)
        for tokens in ((16, 32) if small else (64, 128, 256, 512))
    }
    settings = read_json(RESULTS / "collate.json")["settings"]
    prefix, suffix = int(np.median(settings["prefix_quantiles"])), round(settings["suffix_mean"])
    prefix, suffix = (16, 9) if small else (prefix, suffix)
    packed = prefix + CRITERIA * suffix
    name = f"a post of {prefix} tokens, nine criteria of {suffix}, shared"
    return found | {name: (prompts(vocab, prefix, suffix, CRITERIA), packed)}


@torch.inference_mode()
def answer(model: Any, encoded: EncodedPairs) -> torch.Tensor:
    """Logits of all rows, the post computed once."""
    scorer = RowScorer(model, encoded, CPU, partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    rows = np.arange(len(encoded.lengths))
    return torch.cat([scorer.logits(batch) for batch in scorer.batches(rows, len(rows), "shared")])


def projections(model: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """The product of each projection of the first layers, and nothing else of it."""
    for index in range(min(PRODUCT_LAYERS, model.config.num_hidden_layers)):
        layer = next(module for name, module in model.named_modules() if name.endswith(f"layers.{index}"))
        for name in PROJECTIONS:
            linear: Any = next(module for path, module in layer.named_modules() if path.endswith(name))
            if isinstance(linear, Int8Linear):
                yield partial(_int8_product, codes=linear.codes)
            else:
                yield partial(functional.linear, weight=linear.get_base_layer().weight)


def _int8_product(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(x, codes.t())


def weights(model: Any) -> int:
    """N: the weights of the projections of all layers."""
    config = model.config
    return config.num_hidden_layers * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)


def measure(
    model: Any,
    precision: str,
    cases: dict[str, tuple[EncodedPairs, int]],
    layers: int,
    repeats: int,
    seconds_of: Clock,
) -> list[dict[str, Any]]:
    """A row for each case: seconds of the answer and of the products, for a model of `layers` layers."""
    here = model.config.num_hidden_layers
    timed = min(PRODUCT_LAYERS, here)
    products = list(projections(model))
    rows = []
    for name, (encoded, tokens) in cases.items():
        wide = {
            width: torch.randint(-127, 128, (tokens, width), dtype=torch.int8)
            if precision == "int8"
            else torch.randn(tokens, width, dtype=torch.bfloat16)
            for width in (model.config.hidden_size, model.config.intermediate_size)
        }

        @torch.inference_mode()
        def multiply(wide: dict[int, torch.Tensor] = wide) -> None:
            for index, product in enumerate(products):
                product(
                    wide[model.config.intermediate_size if index % len(PROJECTIONS) == 6 else model.config.hidden_size]
                )

        seconds = interleaved(
            {"answer": partial(answer, model, encoded), "products": multiply}, repeats, clock=seconds_of
        )
        # Of each round: what a busy spell slows, it slows in both.
        answers = [value * layers / here for value in seconds["answer"]]
        floors = [value * layers / timed for value in seconds["products"]]
        rate = 2 * weights(model) * layers / here * tokens / spread(floors)["median"]
        rows.append(
            {
                "precision": precision, "input": name, "tokens": tokens, "seconds": spread(answers),
                "floor": spread(floors), "gemm_gflops": rate / 1e9,
                "ratio": spread(answers)["median"] / spread(floors)["median"],
            }
        )  # fmt: skip
    return rows


def breakdown(model: Any, encoded: EncodedPairs) -> dict[str, float]:
    """Share of an answer's time by kind of operator, seen by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        answer(model, encoded)
    kinds = {"products": PRODUCTS, "attention": ATTENTION, "copies and casts": CASTS}
    spent = dict.fromkeys([*kinds, "the rest"], 0.0)
    for event in seen.key_averages():
        kind = next((kind for kind, names in kinds.items() if event.key in names), "the rest")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()}


def beside_products(shares: dict[str, float]) -> str:
    """What of an answer no product is, so that faster products do not help it."""
    parts = [f"{kind} {share:.0%}" for kind, share in shares.items() if kind != "products"]
    return f"of one pair's time {', '.join(parts)}"


def needed_cores(row: dict[str, Any]) -> float:
    """Cores like this machine's for an answer within the budget, if time falls with their number. Derived."""
    return row["seconds"]["median"] / BUDGET * torch.get_num_threads()


def main() -> None:
    arguments = parser(__doc__, repeats=5)
    add_one_core(arguments)
    arguments.add_argument("--layers", type=int, help="build at most so many layers [as many as fit]")
    options = arguments.parse_args()
    seconds_of = clock(one_core=options.one_core)
    whole = SMALL if options.small else LLAMA_7B
    shape = fitting(whole, options.layers)
    cases = inputs(small=options.small)
    result = Result(
        "latency", options, **vars(whole), layers_measured=shape.layers, product_layers=PRODUCT_LAYERS,
        threads=torch.get_num_threads(), one_core=options.one_core,
        capability=torch.backends.cpu.get_cpu_capability(),
    )  # fmt: skip
    model = random_model(shape)
    profiled = next((each for each, tokens in cases.values() if tokens == PROFILED), next(iter(cases.values()))[0])
    shares = {}
    for precision in ("bf16", "int8"):
        if precision == "int8":
            model = to_int8(model)
        with prepared(model, torch.bfloat16):
            rows = measure(model, precision, cases, whole.layers, options.repeats, seconds_of)
            shares[precision] = breakdown(model, profiled)
        result.add(*({**row, "cores": needed_cores(row)} for row in rows), breakdown=shares)
    bars = [
        Bar(
            f"{row['precision']}, {row['input']}: seconds over the floor", row["ratio"], BAR, at_most=True,
            why_missed=beside_products(shares[row["precision"]]),
        )
        for row in result.value["rows"]
    ]  # fmt: skip
    result.add(bars=bars)
    result.report()


if __name__ == "__main__":
    main()
