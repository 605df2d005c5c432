"""Llama-7B's shapes on one GPU: tokens a second, share of the measured bf16 peak, peak memory, latency.

Random weights and random tokens with the lengths of the full-size synthetic set (`results/collate.json`): nothing is
downloaded, and neither Ray nor MLflow nor Hydra is needed. The kernels are those that raycv trains with. The JSON is
written after every part, and no part starts after `--seconds`; what the GPU's memory does not hold is named and left
out. `--small` runs tiny shapes on a CPU.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.harness import RESULTS, Bar, Result, interleaved, parser, ratios, spread, tell, timed
from benchmarks.models import ADAPTERS, LLAMA_7B, Shape, TokenCount, base_weights, classifier
from raycv.common.devices import is_out_of_memory
from raycv.common.files import read_json
from raycv.data.prompt_encoder import EncodedPairs
from raycv.training.forward import Layout, RowScorer
from raycv.utils import set_seed

CRITERIA, EFFECTIVE = 9, 32
MAX_LENGTH = 512
SMALL = Shape(hidden=64, intermediate=128, heads=4, layers=2)
LATENCIES = 10
FLOPS = {False: 4, True: 6}
"""FLOPs per base weight and token without and with checkpointing: forward, gradient of the input, recompute, 2 each."""


@dataclass(frozen=True)
class Case:
    """One way to train."""

    adapter: str
    checkpointing: bool
    batching: str = "shuffled"
    micro_batch: int = 8
    packing: bool = True


HELD = (
    Case("lora", True),
    Case("dora_raycv", True),
    Case("dora_peft_bf16", True),
    Case("lora", True, micro_batch=EFFECTIVE),
    Case("dora_raycv", True, micro_batch=EFFECTIVE),
)
"""Those whose ratios are held against aims: in turns, as often as is asked for."""
OTHERS = (
    Case("dora_raycv", True, "post_grouped"),
    Case("dora_raycv", False),
    Case("dora_raycv", False, "post_grouped"),
    Case("dora_raycv", True, packing=False),
    Case("dora_raycv", True, micro_batch=EFFECTIVE, packing=False),
    Case("dora_peft", True),
)
"""Once each, and last: PEFT's default takes longest."""


def random_pairs(vocab: int, shrink: int) -> EncodedPairs:
    """Posts at even quantiles of length under nine criteria each, as random tokens; `shrink` divides their lengths."""
    settings = read_json(RESULTS / "collate.json")["settings"]
    generator = np.random.default_rng(0)
    prefixes = generator.permutation(settings["prefix_quantiles"]) // shrink
    shape = (len(prefixes) * CRITERIA, MAX_LENGTH)
    input_ids = generator.integers(3, vocab, size=shape, dtype=np.int32)
    posts = np.repeat(np.arange(len(prefixes), dtype=np.int32), CRITERIA)
    lengths = np.minimum(prefixes[posts] + round(settings["suffix_mean"]), MAX_LENGTH).astype(np.int32)
    for post, prefix in enumerate(prefixes):
        input_ids[posts == post, :prefix] = input_ids[post * CRITERIA, :prefix]
    input_ids[np.arange(MAX_LENGTH) >= lengths[:, None]] = 0
    labels = generator.integers(0, 2, size=len(posts))
    return EncodedPairs(input_ids, lengths, np.arange(len(posts), dtype=np.int32), labels, posts, pad_id=0)


class Setting:
    """The base model under one adapter after another."""

    def __init__(self, shape: Shape, device: torch.device, *, shrink: int = 1) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.encoded = random_pairs(shape.vocab, shrink)
        with device:
            self._base = classifier(shape, seed=0, dtype=self.dtype)

    @contextmanager
    def adapted(self, case: Case) -> Iterator["Work"]:
        """The base under `case`; the adapter is gone afterwards."""
        adapter = ADAPTERS[case.adapter]
        self._base.gradient_checkpointing_disable()
        model = adapter.on(self._base, checkpointing=case.checkpointing)
        try:
            scorer = RowScorer(model, self.encoded, self.device, partial(adapter.context, model))
            with scorer.prepared() as refresh:
                yield Work(model, scorer, case, refresh)
        finally:
            model.zero_grad(set_to_none=True)
            self._base = model.unload()

    def peak_tflops(self, size: int) -> float:
        """TFLOP/s of a large product of matrices in the type of the model, on random data."""
        a, b = (torch.randn(size, size, device=self.device).to(self.dtype) for _ in range(2))
        seconds = interleaved({"gemm": lambda: torch.mm(a, b)}, 10, device=self.device)["gemm"]
        return 2 * size**3 / spread(seconds)["median"] / 1e12


class Work:
    """Training steps and scoring of one adapted model."""

    def __init__(self, model: Any, scorer: RowScorer, case: Case, refresh: Callable[[], None]) -> None:
        self.model, self.scorer, self._refresh = model, scorer, refresh
        grouped = case.batching == "post_grouped"
        self._layout: Layout = "padded" if not case.packing else "shared" if grouped else "packed"
        self._micro_batch = case.micro_batch
        rows = np.arange(len(scorer.encoded.lengths))
        order = rows if grouped else np.random.default_rng(0).permutation(rows)
        self.steps = [order[start : start + EFFECTIVE] for start in range(0, len(rows) - EFFECTIVE + 1, EFFECTIVE)]
        self._labels = torch.from_numpy(scorer.encoded.labels).to(scorer.device)
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def train(self, steps: int | None = None) -> None:
        """That many optimizer steps, all by default."""
        self.model.train()
        for step in self.steps[:steps]:
            rows = self.scorer.sorted(step, self._layout)
            for batch in self.scorer.batches(rows, self._micro_batch, self._layout):
                logits = self.scorer.logits(batch)
                labels = self._labels[torch.from_numpy(batch.rows).to(logits.device)]
                (functional.cross_entropy(logits, labels, reduction="sum") / len(step)).backward()
            self._optimizer.step()
            self._refresh()
            self._optimizer.zero_grad()

    @torch.no_grad()
    def score(self, rows: np.ndarray, layout: Layout) -> None:
        """Logits of `rows`, to the host."""
        self.model.eval()
        for batch in self.scorer.batches(rows, len(rows), layout):
            self.scorer.logits(batch).cpu()


def training(setting: Setting, case: Case) -> dict[str, float]:
    """Seconds, tokens and memory of all optimizer steps under `case`."""
    with setting.adapted(case) as work:
        work.train(1)  # warm-up
        count = TokenCount(work.model)
        _reset_peak(setting.device)
        seconds = timed(work.train, setting.device)
        return {
            "seconds": seconds,
            "real_tokens": int(setting.encoded.lengths[np.concatenate(work.steps)].sum()),
            "computed_tokens": count.removed(),
            "weights": base_weights(work.model),
            "peak_bytes": _peak(setting.device),
        }


def training_row(case: Case, rounds: list[dict[str, float]], peak_tflops: float) -> dict[str, Any]:
    """One row of the result from the rounds of `case`."""
    seconds = spread([each["seconds"] for each in rounds])
    last = rounds[-1]
    flops = FLOPS[case.checkpointing]
    reached = flops * last["weights"] * last["computed_tokens"] / seconds["median"]
    return {
        "part": "training", **asdict(case), "seconds": seconds, "rounds": [each["seconds"] for each in rounds],
        "flops_per_n_token": flops, "real_tokens": last["real_tokens"],
        "computed_tokens": last["computed_tokens"], "tokens_per_second": last["real_tokens"] / seconds["median"],
        "share_of_peak": reached / (peak_tflops * 1e12), "peak_bytes": max(each["peak_bytes"] for each in rounds),
    }  # fmt: skip


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The aims, of what was measured: an adapter that did not fit has none."""
    made = []
    for size in (8, EFFECTIVE):
        found = {
            row["adapter"]: row
            for row in rows
            if row["checkpointing"] and row["packing"] and row["batching"] == "shuffled" and row["micro_batch"] == size
        }
        ours, lora = found.get("dora_raycv"), found.get("lora")
        peft = [found[name] for name in ("dora_peft", "dora_peft_bf16") if name in found]
        where = f"checkpointing on, micro-batches of {size}"
        if ours:
            made.append(Bar(f"share of the 6N roofline, DoRA of raycv, {where}", ours["share_of_peak"], 0.6))
        if ours and lora:
            over = ratios(*_common(ours, lora))
            made.append(Bar.of_rounds(f"times the time of PEFT's LoRA, {where}", over, 1.1, at_most=True))
        if ours and peft:
            better = min(peft, key=lambda row: row["seconds"]["median"])
            over = ratios(*_common(better, ours))
            made.append(Bar.of_rounds(f"times faster than the better PEFT DoRA, {where}", over, 2.5))
    return made


def _common(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of the rounds that both have: time may end within a round."""
    rounds = min(len(one["rounds"]), len(other["rounds"]))
    return one["rounds"][:rounds], other["rounds"][:rounds]


def latency(setting: Setting, adapter: str) -> list[dict[str, Any]]:
    """Milliseconds from tokens on the host to logits on the host: one pair, and a post under all its criteria."""
    with setting.adapted(Case(adapter, checkpointing=False)) as work:
        median_post = int(
            np.argsort(setting.encoded.lengths[::CRITERIA])[len(setting.encoded.lengths) // CRITERIA // 2]
        )
        rows = np.arange(CRITERIA) + median_post * CRITERIA
        calls = {
            "one pair": partial(work.score, rows[:1], layout="padded"),
            "a post, nine pairs": partial(work.score, rows, layout="padded"),
            "a post, nine pairs, shared": partial(work.score, rows, layout="shared"),
        }
        seconds = interleaved(calls, LATENCIES, device=setting.device)
        tokens = int(setting.encoded.lengths[rows[0]])
    return [
        {"part": "latency", "adapter": adapter, "input": name, "tokens_of_a_pair": tokens, "seconds": spread(values)}
        for name, values in seconds.items()
    ]


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def fits(part: str, work: Callable[[], object], device: torch.device, skipped: list[str]) -> bool:
    """Does `work`; whether the memory held it. What it did not hold is given back, and `part` named in `skipped`."""
    tell(part)
    try:
        work()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Here, where no traceback holds the tensors any more.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    skipped.append(f"{part}: out of memory")
    return False


def _add_round(done: list[dict[str, float]], setting: Setting, case: Case) -> None:
    done.append(training(setting, case))


def measure(result: Result, setting: Setting, options: argparse.Namespace) -> None:
    """All parts, in rounds; what has no time left, or does not fit, is named in `skipped`."""
    deadline = time.monotonic() + options.seconds
    peak = setting.peak_tflops(256 if options.small else 8192)
    with setting.adapted(Case("dora_raycv", checkpointing=False)) as work:
        result.add(peak_tflops=peak, packing=work.scorer.check_packing() or "logits equal those of the plain path")
    skipped: list[str] = []
    rounds: dict[Case, list[dict[str, float]]] = {case: [] for case in HELD + OTHERS}

    def train(cases: tuple[Case, ...]) -> None:
        for case in cases:
            done = rounds.get(case)
            if done is None:  # it did not fit
                continue
            if time.monotonic() > deadline:
                skipped.append(f"training, {case}: no time")
            elif not fits(f"training, {case}", partial(_add_round, done, setting, case), setting.device, skipped):
                del rounds[case]
            rows = [training_row(each, values, peak) for each, values in rounds.items() if values]
            result.renew(rows, bars(rows), "training")

    for _ in range(options.repeats):
        train(HELD)
    for adapter in ADAPTERS:
        if time.monotonic() > deadline:
            skipped.append(f"latency, {adapter}: no time")
        else:
            fits(
                f"latency, {adapter}",
                lambda adapter=adapter: result.add(*latency(setting, adapter)),  # type: ignore[misc]
                setting.device,
                skipped,
            )
    train(OTHERS)
    result.add(skipped=skipped)


def main() -> None:
    arguments = parser(__doc__, repeats=2)
    arguments.add_argument("--seconds", type=float, default=360, help="start nothing after so long [%(default)s]")
    options = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.small else "cpu")
    if device.type == "cpu" and not options.small:
        raise SystemExit("no GPU was found; --small shows on a CPU that the script runs")
    set_seed(0)
    shape = SMALL if options.small else LLAMA_7B
    setting = Setting(shape, device, shrink=8 if options.small else 1)
    result = Result(
        "gpu", options, **vars(shape), dtype=str(setting.dtype).removeprefix("torch."), effective_batch=EFFECTIVE,
        dropout=0.05, titles={name: adapter.title for name, adapter in ADAPTERS.items()},
    )  # fmt: skip
    measure(result, setting, options)
    result.report()


if __name__ == "__main__":
    main()
