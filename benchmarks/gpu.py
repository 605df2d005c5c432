"""Llama-7B's shapes on one GPU, in one run of at most nine minutes: where the time goes, and whether the aims are met.

Random weights and random tokens with the lengths of the full-size synthetic set (`results/collate.json`): nothing is
downloaded, and neither Ray nor MLflow nor Hydra is needed. The kernels are those that raycv trains with. `PARTS` lists
what is measured, in its order. The JSON is written again after every row. A part ends when its time is up, and leaves
what it did not need to the parts after it. What does not fit, fails or has no time is named in `skipped`. Each row has
the host's seconds beside all seconds (`benchmarks.gpu_parts`). `--small` runs tiny shapes on a CPU.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.gpu_parts import (
    Item,
    Row,
    attention,
    host_and_total,
    kernels,
    launches,
    measured,
    products,
    replayed,
)
from benchmarks.harness import RESULTS, Bar, Result, interleaved, parser, ratios, spread, tell
from benchmarks.models import ADAPTERS, LLAMA_7B, Shape, TokenCount, base_weights, classifier
from raycv.common.devices import is_out_of_memory
from raycv.common.files import read_json
from raycv.data.prompt_encoder import EncodedPairs
from raycv.training.forward import Layout, RowScorer, compiled_layers
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
    compiled: bool = False


WHOLE = Case("dora_raycv", True, micro_batch=EFFECTIVE)
HELD = (
    WHOLE,
    replace(WHOLE, compiled=True),
    Case("lora", True, micro_batch=EFFECTIVE),
    Case("dora_raycv", True),
    Case("dora_raycv", True, compiled=True),
    Case("lora", True),
    Case("dora_peft_bf16", True),
)
"""With checkpointing: those whose ratios are held against aims, in turns."""
OTHERS = (
    Case("dora_raycv", False, micro_batch=EFFECTIVE),
    Case("dora_raycv", False, micro_batch=EFFECTIVE // 2),
    Case("dora_raycv", False, micro_batch=EFFECTIVE, compiled=True),
    Case("dora_raycv", False, "post_grouped", EFFECTIVE),
    Case("dora_raycv", True, "post_grouped", EFFECTIVE),
)
"""Mostly without checkpointing."""
LAST = (Case("dora_peft", True),)
"""PEFT's default takes longest."""


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
        self.device, self.shape = device, shape
        self.backend = "inductor" if device.type == "cuda" else "aot_eager"
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.encoded = random_pairs(shape.vocab, shrink)
        with device:
            self._base = classifier(shape, seed=0, dtype=self.dtype)

    @contextmanager
    def adapted(self, case: Case) -> Iterator["Work"]:
        """The base under `case`; the adapter is gone afterwards."""
        adapter = ADAPTERS[case.adapter]
        self._base.gradient_checkpointing_disable()
        head = {name: value.clone() for name, value in self._base.score.state_dict().items()}
        model = adapter.on(self._base, checkpointing=case.checkpointing)
        try:
            scorer = RowScorer(model, self.encoded, self.device, partial(adapter.context, model))
            compiled = compiled_layers(model, self.backend) if case.compiled else nullcontext()
            with scorer.prepared() as refresh, compiled:
                yield Work(model, scorer, case, refresh)
        finally:
            model.zero_grad(set_to_none=True)
            self._base = model.unload()
            self._base.score.load_state_dict(head)  # PEFT leaves the trained head


class Work:
    """Training steps and scoring of one adapted model."""

    def __init__(self, model: Any, scorer: RowScorer, case: Case, refresh: Callable[[], None]) -> None:
        self.model, self.scorer, self.refresh = model, scorer, refresh
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
            self.refresh()
            self._optimizer.zero_grad()

    @torch.no_grad()
    def score(self, rows: np.ndarray, layout: Layout) -> None:
        """Logits of `rows`, to the host."""
        self.model.eval()
        for batch in self.scorer.batches(rows, len(rows), layout):
            self.scorer.logits(batch).cpu()


def training(setting: Setting, case: Case) -> Row:
    """Seconds, tokens and memory of all optimizer steps under `case`."""
    with setting.adapted(case) as work:
        work.train(2)  # a warm-up, with the lengths of two steps: compiled code takes the second as dynamic
        count = TokenCount(work.model)
        _reset_peak(setting.device)
        host, seconds = host_and_total(work.train, setting.device)
        return {
            "seconds": seconds,
            "host_seconds": host,
            "real_tokens": int(setting.encoded.lengths[np.concatenate(work.steps)].sum()),
            "computed_tokens": count.removed(),
            "weights": base_weights(work.model),
            "peak_bytes": _peak(setting.device),
        }


def training_row(case: Case, rounds: list[Row], peak_tflops: float) -> Row:
    """One row of the result from the rounds of `case`."""
    seconds = spread([each["seconds"] for each in rounds])
    last = rounds[-1]
    flops = FLOPS[case.checkpointing]
    reached = flops * last["weights"] * last["computed_tokens"] / seconds["median"]
    return {
        "part": "training", **asdict(case), "seconds": seconds, "rounds": [each["seconds"] for each in rounds],
        "host_seconds": spread([each["host_seconds"] for each in rounds]),
        "flops_per_n_token": flops, "real_tokens": last["real_tokens"],
        "computed_tokens": last["computed_tokens"], "tokens_per_second": last["real_tokens"] / seconds["median"],
        "share_of_peak": reached / (peak_tflops * 1e12), "peak_bytes": max(each["peak_bytes"] for each in rounds),
    }  # fmt: skip


def bars(rows: list[Row]) -> list[Bar]:
    """The aims, of what was measured: an adapter that did not fit has none. The faster of eager and compiled counts."""
    made = []
    for checkpointing, size in ((True, 8), (True, EFFECTIVE), (False, EFFECTIVE)):
        found: dict[str, Row] = {}
        for row in sorted(rows, key=lambda row: -row["seconds"]["median"]):
            if (row["checkpointing"], row["batching"], row["micro_batch"]) == (checkpointing, "shuffled", size):
                found[row["adapter"]] = row
        ours, lora = found.get("dora_raycv"), found.get("lora")
        peft = [found[name] for name in ("dora_peft", "dora_peft_bf16") if name in found]
        where = f"checkpointing {'on' if checkpointing else 'off'}, micro-batches of {size}"
        if ours:
            roofline = f"share of the {FLOPS[checkpointing]}N roofline, DoRA of raycv, {where}"
            made.append(Bar(roofline, ours["share_of_peak"], 0.6))
        if ours and lora:
            over = ratios(*_common(ours, lora))
            made.append(Bar.of_rounds(f"times the time of PEFT's LoRA, {where}", over, 1.0, at_most=True))
        if ours and peft:
            better = min(peft, key=lambda row: row["seconds"]["median"])
            over = ratios(*_common(better, ours))
            made.append(Bar.of_rounds(f"times faster than the better PEFT DoRA, {where}", over, 4))
    return made


def _common(one: Row, other: Row) -> tuple[list[float], list[float]]:
    """Seconds of the rounds that both have: time may end within a round."""
    rounds = min(len(one["rounds"]), len(other["rounds"]))
    return one["rounds"][:rounds], other["rounds"][:rounds]


def latency(setting: Setting, adapter: str, mode: str | None = None) -> list[Row]:
    """Seconds from tokens on the host to logits on the host: one pair, and a post under all its criteria."""
    with setting.adapted(Case(adapter, checkpointing=False)) as work:
        middle = int(np.argsort(setting.encoded.lengths[::CRITERIA])[len(setting.encoded.lengths) // CRITERIA // 2])
        rows = np.arange(CRITERIA) + middle * CRITERIA
        calls = {
            "one pair": partial(work.score, rows[:1], layout="padded"),
            "a post, nine pairs": partial(work.score, rows, layout="padded"),
            "a post, nine pairs, shared": partial(work.score, rows, layout="shared"),
        }
        with compiled_layers(work.model, setting.backend, mode) if mode else nullcontext():
            seconds = interleaved(calls, LATENCIES, device=setting.device)
        tokens = int(setting.encoded.lengths[rows[0]])
    given = {"adapter": adapter, "tokens_of_a_pair": tokens, **({"mode": mode} if mode else {})}
    return [{**given, "input": name, "seconds": spread(values)} for name, values in seconds.items()]


def one_layer(setting: Setting, compiled: bool) -> list[Row]:
    """A real layer in a whole optimizer step: seconds, kernels by kind, and the gradient's size beside eager's."""
    with setting.adapted(replace(WHOLE, compiled=compiled)) as work:
        work.train(2)
        found = measured(partial(work.train, 1), setting.device)
        inside = kernels(partial(work.train, 1), setting.device)
        share = sum(inside["kernel_seconds"].values()) / found["seconds"]["median"]
        what = f"one layer, a step of {EFFECTIVE} pairs, {'compiled' if compiled else 'eager'}"
        return [{"what": what, **found, **inside, "kernels_of_seconds": share}]


def equality(setting: Setting) -> list[Row]:
    """The largest difference of a step's logits, compiled and eager, without dropout."""
    found = []
    for compiled in (False, True):
        with setting.adapted(replace(WHOLE, compiled=compiled)) as work, torch.no_grad():
            work.model.eval()
            rows = work.scorer.sorted(work.steps[0], "packed")
            found.append(torch.cat([work.scorer.logits(each) for each in work.scorer.batches(rows, 8, "packed")]))
    worst = float((found[0] - found[1]).abs().max())
    return [{"what": "logits, compiled and eager", "difference": worst, "largest": float(found[0].abs().max())}]


def refreshes(setting: Setting) -> Iterator[Item]:
    """DoRA's norms of a whole model after an optimizer step."""

    def row(graph: bool) -> list[Row]:
        with setting.adapted(WHOLE) as work:
            refresh = replayed(work.refresh) if graph else work.refresh
            what = f"refresh of the norms, {'a graph' if graph else 'eager'}"
            return [{"what": what, **measured(refresh, setting.device)}]

    yield "refresh, eager", partial(row, False)
    if setting.device.type == "cuda":
        yield "refresh, graph", partial(row, True)


def strict_twice(setting: Setting) -> list[Row]:
    """Whether a step from the same start gives the same adapters bit for bit, where torch allows no other kernels."""
    made = []
    try:
        for _ in range(2):
            set_seed(0)
            torch.use_deterministic_algorithms(True)  # it refuses other kernels, and `set_seed` warns of them
            with setting.adapted(WHOLE) as work:
                work.train(1)
                made.append(
                    torch.cat([p.detach().flatten().float() for p in work.model.parameters() if p.requires_grad])
                )
    finally:
        set_seed(0)
    return [{"what": "a strict step twice", "equal": bool(torch.equal(*made))}]


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def fits(name: str, work: Callable[[], object], device: torch.device, skipped: list[str]) -> bool:
    """Does `work`; whether it could. What failed is named in `skipped` with its reason, and its memory given back."""
    tell(name)
    try:
        work()
        return True
    except Exception as error:  # noqa: BLE001 - minutes of a GPU: what fails costs its own row alone
        reason = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {str(error).splitlines()[0]}"
    # Here, where no traceback holds the tensors any more.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    skipped.append(f"{name}: {reason}")
    return False


class Plan:
    """Measures the parts, each until its deadline, and writes after every row."""

    def __init__(self, result: Result, device: torch.device, seconds: float) -> None:
        self.result, self.device = result, device
        self.skipped: list[str] = []
        self._scale = seconds / sum(PARTS.values())
        self._deadline = time.monotonic()

    def part(self, name: str, items: Iterator[Item]) -> None:
        """Measures `items` until the part's time is up."""
        self._deadline += PARTS[name] * self._scale
        for item, work in items:
            self._measure(name, item, work)

    def _measure(self, part: str, item: str, work: Callable[[], list[Row]]) -> bool:
        if time.monotonic() > self._deadline:
            self.skipped.append(f"{item}: no time")
            self.result.add(skipped=self.skipped)
            return False

        def keep() -> None:
            rows = work()
            self.result.add(*({"part": part, **row} for row in rows))

        done = fits(item, keep, self.device, self.skipped)
        self.result.add(skipped=self.skipped)
        return done

    def train(self, name: str, setting: Setting, cases: tuple[Case, ...], rounds: int = 1) -> None:
        """Trains `cases` in turns. A case that failed is not tried again."""
        self._deadline += PARTS[name] * self._scale
        taken: dict[Case, list[Row]] = {}
        failed: set[Case] = set()
        before = [row for row in self.result.value["rows"] if row["part"] == "training"]

        def keep(case: Case) -> list[Row]:
            found = training(setting, case)
            taken.setdefault(case, []).append(found)
            rows = before + [training_row(each, values, self.peak) for each, values in taken.items()]
            self.result.renew(rows, bars(rows), "training")
            return []

        for _ in range(rounds):
            for case in cases:
                said = f"training, {case}"
                if case not in failed and not self._measure("training", said, partial(keep, case)):
                    failed.add(case)

    @property
    def peak(self) -> float:
        """TFLOP/s of the large product."""
        found = [row["tflops"] for row in self.result.value["rows"] if row.get("what") == "large"]
        return float(found[0])


PARTS = {
    "operations": 40.0,
    "one layer": 45.0,
    "attention": 30.0,
    "the model": 25.0,
    "checkpointing": 240.0,
    "without": 100.0,
    "rest": 60.0,
}
"""Seconds of each part, in their order. What a part does not need, the later ones have."""


def measure(result: Result, shape: Shape, device: torch.device, options: argparse.Namespace) -> None:
    """All parts."""
    small, plan = options.small, Plan(result, device, options.seconds)
    shrink = 8 if small else 1
    one = Setting(replace(shape, layers=1), device, shrink=shrink)
    plan.part("operations", operations(shape, one.dtype, device, small=small))
    items: list[Item] = [(f"one layer, compiled={each}", partial(one_layer, one, each)) for each in (False, True)]
    plan.part("one layer", iter([*items, ("compiled and eager", partial(equality, one))]))
    del one, items
    plan.part("attention", attention(shape, torch.bfloat16, device, small=small))
    setting = Setting(shape, device, shrink=shrink)
    with setting.adapted(Case("dora_raycv", checkpointing=False)) as work:
        result.add(packing=work.scorer.check_packing() or "logits equal those of the plain path")
    result.add(peak_tflops=plan.peak)
    plan.part("the model", refreshes(setting))
    plan.train("checkpointing", setting, HELD, options.repeats)
    plan.train("without", setting, OTHERS)
    modes = [
        ("lora", None),
        ("dora_raycv", None),
        *([("dora_raycv", "reduce-overhead")] if device.type == "cuda" else []),
    ]
    said: list[Item] = [(f"latency, {name}, {mode}", partial(latency, setting, name, mode)) for name, mode in modes]
    plan.part("rest", iter([("a strict step twice", partial(strict_twice, setting)), *said]))
    plan.train("rest", setting, LAST)


def operations(shape: Shape, dtype: torch.dtype, device: torch.device, *, small: bool) -> Iterator[Item]:
    """Launches and products; the large product is first, since all shares are of its rate."""
    yield from products(shape, dtype, device, small=small)
    yield from launches(device, small=small)


def main() -> None:
    arguments = parser(__doc__, repeats=2)
    arguments.add_argument("--seconds", type=float, default=520, help="start no row after so long [%(default)s]")
    options = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.small else "cpu")
    if device.type == "cpu" and not options.small:
        raise SystemExit("no GPU was found; --small shows on a CPU that the script runs")
    set_seed(0)
    shape = SMALL if options.small else LLAMA_7B
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    result = Result(
        "gpu", options, **vars(shape), dtype=dtype, effective_batch=EFFECTIVE, dropout=0.05, parts=list(PARTS),
        titles={name: adapter.title for name, adapter in ADAPTERS.items()},
    )  # fmt: skip
    measure(result, shape, device, options)
    result.report()


if __name__ == "__main__":
    main()
