"""Renders the results as Markdown: all tables into the docs, the figures that matter most into the README.

Writes between the markers of both files; `--check` only tells whether they are what the results give.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raycv.common.files import read_json, write_text
from raycv.errors import counted

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
ORDER = (
    "layer", "fold", "collate", "growth", "batching", "overhead", "scale", "many_folds", "gpu", "layer_gpu",
    "latency_cli", "load", "latency", "drift", "int8", "report",
)  # fmt: skip
ONE_AFTER_ANOTHER = ("latency_cli", "load")
"""Benchmarks whose variants do not take turns."""
OWED = {
    "gpu": "GPU figures are still owed: `python -m benchmarks.gpu` measures them on a machine that has one.",
    "layer": "Figures of one real-width layer are still owed: `python -m benchmarks.layer`, on an idle machine.",
    "growth": "Figures of how cost grows are still owed: `python -m benchmarks.growth`, on an idle machine.",
    "batching": "The study of post_grouped's accuracy is still owed: `python -m benchmarks.batching`, about an hour.",
    "overhead": "Figures of what a run costs beside its training are still owed: `python -m benchmarks.overhead`.",
    "latency_cli": "Figures of how fast `raycv.infer` answers are still owed: `python -m benchmarks.latency_cli`.",
    "load": "Figures of the resident scorer under load are still owed: `python -m benchmarks.load`.",
    "scale": "Figures of how folds run in parallel are still owed: `python -m benchmarks.scale`.",
    "many_folds": "Figures of the driver of 250 folds are still owed: `python -m benchmarks.many_folds`.",
    "drift": "What bf16 and int8 change of the scores is still owed: `python -m benchmarks.drift`.",
    "latency": "Figures of an answer's latency are still owed: `python -m benchmarks.latency`, on an idle machine.",
    "report": "Figures of what the statistics of a run cost are still owed: `python -m benchmarks.report`.",
}

SUMMARY = (
    (
        "an epoch of a fold with its validation, beside Hugging Face's Trainer with PEFT's DoRA, padded to 512",
        "fold", "shuffled: an epoch with validation, times faster than the Trainer padded to 512", " times faster",
    ),
    (
        "the same with `train.batching=post_grouped`",
        "fold", "post_grouped: an epoch with validation, times faster than the Trainer padded to 512", " times faster",
    ),
    (
        "a decoder layer of a 7B in bf16, beside PEFT's DoRA",
        "layer", "times faster than the better PEFT DoRA, 256 tokens, bf16", " times faster",
    ),
    (
        "the same beside PEFT's LoRA",
        "layer", "times the time of PEFT's LoRA, 256 tokens, bf16", " times its time",
    ),
    (
        "a wave of two folds, beside the time inside their training loops",
        "overhead", "a wave of two folds beside its loops, seconds", " s",
    ),
    (
        "one answer with a resident scorer, start of the asking process included (p95, the quickstart's model)",
        "latency_cli", "p95 of fresh processes with a scorer, seconds", " s",
    ),
)  # fmt: skip
"""The README's figures: what was measured, the benchmark, its claim, a unit."""

Json = dict[str, Any]
Column = tuple[str, Callable[[Json], str]]


def seconds(values: Json) -> str:
    """Median and range; of a single measurement itself."""
    if values["n"] == 1:
        return f"{values['median']:.3g}"
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g})"


def gigabytes(row: Json, key: str) -> str:
    """`key` of `row` in GB; nothing where it was not measured."""
    return f"{row[key] / 1e9:.1f}" if row.get(key) else ""


def _times(result: Json, row: Json, key: str) -> str:
    """How much faster than the first row."""
    return f"{result['rows'][0][key]['median'] / row[key]['median']:.1f}x"


def _grown(result: Json, row: Json, key: str) -> str:
    """`key` of `row` over that of the base under the same batching."""
    (base,) = (each for each in result["rows"] if (each["change"], each["batching"]) == ("base", row["batching"]))
    value, before = row[key], base[key]
    if isinstance(value, dict):
        value, before = value["median"], before["median"]
    return f"{value / before:.2f}x"


def llama(result: Json) -> str:
    """The model whose shapes were measured."""
    return "a tiny Llama" if result["small"] else "Llama-7B"


def layer(result: Json) -> list[str]:
    """One layer: time, FLOPs and memory."""
    titles = result["settings"]["titles"]
    place = " on a GPU" if result["benchmark"].endswith("_gpu") else ""
    intro = (
        f"**One decoder layer of {llama(result)}{place}**, forward and backward under gradient checkpointing. The "
        f"times are seconds of a micro-batch, {result['settings']['micro_batches']} of them an optimizer step. N is "
        "the number of the layer's base weights."
    )
    columns: list[Column] = [
        ("dtype", lambda row: row["dtype"]),
        ("tokens", lambda row: str(row["tokens"])),
        ("adapter", lambda row: titles[row["variant"]]),
        ("seconds", lambda row: seconds(row["seconds"])),
        ("FLOPs / (N·token)", lambda row: f"{row['flops_per_n_token']:.1f}" if row["flops_per_n_token"] else ""),
        ("peak memory of a process, GB", lambda row: gigabytes(row, "peak_bytes")),
    ]
    return [intro, "", *table(columns, result["rows"])]


def fold(result: Json) -> list[str]:
    """One fold beside the Trainer."""
    titles, settings = result["settings"]["titles"], result["settings"]
    steps = -(-settings["train_pairs"] // settings["effective_batch"])
    batches = f" in batches of {settings['eval_batch']} at most" if "eval_batch" in settings else ""
    intro = (
        f"**One fold**: an epoch of {settings['train_pairs']} pairs in {counted(steps, 'optimizer step')}, and the "
        f"validation of {settings['validation_pairs']}{batches}. "
        f"Llama {settings['hidden']} wide and {settings['layers']} layers deep, float32. Gradient checkpointing is on, "
        "apart from rows of defaults."
    )
    columns: list[Column] = [
        ("", lambda row: titles[row["variant"]]),
        ("epoch, s", lambda row: seconds(row["epoch_seconds"])),
        ("faster", lambda row: _times(result, row, "epoch_seconds")),
        ("validation alone, s", lambda row: seconds(row["validation_seconds"])),
        ("faster", lambda row: _times(result, row, "validation_seconds")),
        ("tokens, validation included", lambda row: f"{row['epoch_tokens']:,}"),
    ]
    parity = result["parity"]
    same = (
        f"Without dropout and in the same order, the losses of {parity['steps']} optimizer steps differ from the "
        f"Trainer's by {parity['largest_difference']:.1g} at most (a small model)."
    )
    return [intro, "", *table(columns, result["rows"]), "", same]


def collate(result: Json) -> list[str]:
    """Padding."""
    intro = f"**Tokens computed over real tokens**, one epoch of {result['settings']['pairs']:,} pairs."
    columns: list[Column] = [
        ("batches", lambda row: row["batching"]),
        ("micro-batch", lambda row: str(row["micro_batch"])),
        ("tokens", lambda row: f"{row['tokens']:,}"),
        ("ratio", lambda row: f"{row['ratio']:.2f}"),
    ]
    return [intro, "", *table(columns, result["rows"])]


def growth(result: Json) -> list[str]:
    """What grows with what."""
    columns: list[Column] = [
        ("change", lambda row: row["change"]),
        ("batching", lambda row: row["batching"]),
        ("pairs", lambda row: f"{row['pairs']:,}"),
        ("epoch, s", lambda row: seconds(row["epoch_seconds"])),
        ("time", lambda row: _grown(result, row, "epoch_seconds")),
        ("tokens", lambda row: _grown(result, row, "epoch_tokens")),
        ("validation, s", lambda row: seconds(row["validation_seconds"])),
        ("time", lambda row: _grown(result, row, "validation_seconds")),
        ("tokens", lambda row: _grown(result, row, "validation_tokens")),
    ]
    return ["**Growth**: an epoch with its validation, and validation alone.", "", *table(columns, result["rows"])]


def batching(result: Json) -> list[str]:
    """The study of train.batching."""
    settings = result["settings"]
    intro = (
        f"**Does post_grouped cost accuracy?** {counted(len(result['rows']), 'replicate')}, each of its own data set: "
        f"{settings['posts']:,} posts x 9 criteria to train on, {settings['test_posts']:,} to test on. Tiny base, "
        f"{counted(settings['epochs'], 'epoch')}, the best of them."
    )
    rows = [{"batching": name, **values} for name, values in result.get("means", {}).items()]
    columns: list[Column] = [
        ("batching", lambda row: row["batching"]),
        ("mean F1", lambda row: f"{row['f1']:.4f}"),
        ("mean ROC-AUC", lambda row: f"{row['roc_auc']:.4f}"),
        ("CPU seconds of a training", lambda row: f"{row['cpu_seconds']:.0f}"),
    ]
    found = [
        f"{metric}: {way} - shuffled = {values['mean']:+.4f}, 95 % interval {values['low']:+.4f} to "
        f"{values['high']:+.4f} ({values['pairs']} pairs, paired t-test)"
        for way, metrics in result.get("paired", {}).items()
        for metric, values in metrics.items()
    ]
    if "harmless" in result:
        interval, margin = result["paired"]["post_grouped"]["f1"], settings["margin"]
        verdict = "harmless" if result["harmless"] else "a loss" if interval["high"] < -margin else "not decided"
        found.append(f"the rule: F1's whole interval above -{margin} is harmless, below it a loss. Here: {verdict}")
        if verdict == "not decided":
            found.append(f"replicates for an interval of ±{margin}: about {interval['needed']}")
    return [intro, "", *table(columns, rows), "", *(f"- {line}" for line in found)]


def overhead(result: Json) -> list[str]:
    """What a run costs beside its loops."""
    rows = result["rows"]
    columns: list[Column] = [
        ("run", lambda row: row["case"]),
        ("wall, s", lambda row: seconds(row["wall"])),
        ("before the first fold", lambda row: seconds(row["before"])),
        ("inside the loops", lambda row: seconds(row["loops"])),
        ("beside them, per fold", lambda row: seconds(row["per_fold"])),
        ("beside them, per wave of folds", lambda row: seconds(row["wave"])),
        ("runs", lambda row: str(row["wave"]["n"])),
    ]
    intro = f"**The cost of a run beside its training**, {result['settings']['cores']} cores, seconds."
    lines = [intro, "", *table(columns, rows)]
    timed = [row for row in rows if "phase_imports" in row]
    if not timed:
        return lines
    phases: list[Column] = [
        ("run", lambda row: row["case"]),
        ("until the worker runs", lambda row: seconds(row["phase_processes"])),
        ("its imports", lambda row: seconds(row["phase_imports"])),
        ("base model, adapters", lambda row: seconds(row["phase_model"])),
        ("the loop", lambda row: seconds(row["phase_loop"])),
        ("checkpoint", lambda row: seconds(row["phase_checkpoint"])),
        ("until the run knows", lambda row: seconds(row["phase_reports"])),
    ]
    head = (
        "The seconds of one fold by phase. The loop includes the time before its first epoch, which `inside` above "
        "does not:"
    )
    return [*lines, "", head, "", *table(phases, timed)]


def scale(result: Json) -> list[str]:
    """Parallel efficiency."""
    settings = result["settings"]
    if "sleeps" in settings:  # as it was measured once: the difference of two sleeps
        short, long = settings["sleeps"]
        columns: list[Column] = [
            ("workers", lambda row: str(row["workers"])),
            ("waves", lambda row: str(row["waves"])),
            (f"wall at {short:g} s", lambda row: seconds(row["short"])),
            (f"wall at {long:g} s", lambda row: seconds(row["long"])),
            ("efficiency beyond start-up", lambda row: f"{row['efficiency']:.2f}"),
        ]
        return ["**Five folds that sleep**, on logical workers.", "", *table(columns, result["rows"])]
    columns = [
        ("workers", lambda row: str(row["workers"])),
        ("waves", lambda row: str(row["waves"])),
        ("wall, s", lambda row: seconds(row["wall"])),
        ("until the first folds of all places began, s", lambda row: seconds(row["first"])),
        ("from a fold to the next in its place, s", lambda row: seconds(row["later"]) if "later" in row else ""),
        ("efficiency beyond start-up", lambda row: seconds(row["efficiency"])),
        ("with it", lambda row: seconds(row["absolute"])),
        ("with it, folds of an hour (derived)", lambda row: seconds(row["of_an_hour"])),
    ]
    intro = (
        f"**Five folds that sleep {settings['sleep']:g} s**, on logical workers; the cores that start their processes "
        f"are {result['environment']['cpus']}."
    )
    return [intro, "", *table(columns, result["rows"])]


def many_folds(result: Json) -> list[str]:
    """The driver of a large study."""
    settings = result["settings"]
    columns: list[Column] = [
        ("folds, at once", lambda row: f"{row['folds']}, {row['at_once']}"),
        ("wall, s", lambda row: f"{row['wall']:.0f}"),
        ("until the first folds of all places began, s", lambda row: f"{row['first']:.0f}"),
        ("from a fold to the next in its place, s", lambda row: f"{row['gap']:.2f} (at most {row['longest_gap']:.1f})"),
        ("of a fold", lambda row: f"{row['overhead']:.1%}"),
        ("CPU time of the driver, s", lambda row: f"{row['driver_cpu_seconds']:.0f}"),
        (
            "its memory at the start and at most, GB",
            lambda row: f"{gigabytes(row, 'memory_start')}, {gigabytes(row, 'memory_most')}",
        ),
        ("MLflow rows a second", lambda row: f"{row['mlflow_records_per_second']:.0f}"),
        ("MLflow behind the last fold, s", lambda row: f"{row['mlflow_behind']:.1f}"),
    ]
    intro = f"**{settings['folds']} folds that sleep {settings['sleep']:g} s**, with MLflow in SQLite."
    return [intro, "", *table(columns, result["rows"])]


def latency_cli(result: Json) -> list[str]:
    """Fresh processes of raycv.infer."""
    columns: list[Column] = [
        ("one pair", lambda row: row["way"]),
        ("p50, s", lambda row: f"{row['p50']:.2f}"),
        ("p95, s", lambda row: f"{row['p95']:.2f}"),
        ("processor time, s", lambda row: f"{row['cpu']:.2f}" if row["cpu"] is not None else ""),
        ("processes", lambda row: str(row["n"])),
    ]
    parts = [{"part": part, "seconds": f"{value:.2f}"} for part, value in result["cold_seconds"].items()]
    spent: list[Column] = [("a cold one, by part", lambda row: row["part"]), ("seconds", lambda row: row["seconds"])]
    intro = "**`raycv.infer`, process start to exit**, the quickstart's model; logging to MLflow included."
    return [intro, "", *table(columns, result["rows"]), "", *table(spent, parts)]


def load(result: Json) -> list[str]:
    """The scorer under load."""
    clients: list[Column] = [
        ("clients", lambda row: str(row["clients"])),
        ("answers per second", lambda row: f"{row['per_second']:.1f}"),
        ("503", lambda row: str(row["refused_503"])),
        ("other errors", lambda row: str(row["errors"])),
    ]
    ways: list[Column] = [("nine criteria", lambda row: row["way"]), ("seconds", lambda row: seconds(row["seconds"]))]
    intro = f"**The resident scorer**, the quickstart's model, {result['settings']['seconds']:g} s of load."
    parts = {key: [row for row in result["rows"] if key in row] for key in ("clients", "way")}
    lines = [intro, "", *table(clients, parts["clients"]), "", *table(ways, parts["way"])]
    if kept := result.get("logging"):
        # MLflow is written to beside the answers, and slower while they come.
        lines += [
            "",
            f"- logged to MLflow as the load ended: {kept['in_mlflow']:,} of {kept['asked']:,} answers",
        ]
    return lines


def gpu(result: Json) -> list[str]:
    """Llama-7B's shapes on a GPU."""
    titles = result["settings"]["titles"]
    training: list[Column] = [
        ("adapter", lambda row: titles[row["adapter"]]),
        ("checkpointing", lambda row: "on" if row["checkpointing"] else "off"),
        ("batching", lambda row: row["batching"]),
        ("packed", lambda row: "yes" if row["packing"] else "no"),
        ("compiled", lambda row: "yes" if row.get("compiled") else "no"),
        ("micro-batch", lambda row: str(row["micro_batch"])),
        ("real tokens/s", lambda row: f"{row['tokens_per_second']:,.0f}"),
        ("host's seconds of all", _host),
        ("FLOPs / (N·token) that it needs", lambda row: str(row["flops_per_n_token"])),
        ("these, of all positions (padding too), of the measured peak", lambda row: f"{row['share_of_peak']:.0%}"),
        ("peak memory, GB", lambda row: gigabytes(row, "peak_bytes")),
    ]
    latency: list[Column] = [
        ("adapter", lambda row: titles[row["adapter"]] + (f", {row['mode']}" if "mode" in row else "")),
        ("input", lambda row: row["input"]),
        ("seconds", lambda row: seconds(row["seconds"])),
    ]
    single: list[Column] = [
        ("part", lambda row: row["part"]),
        ("operation", lambda row: row["what"]),
        ("m, n, k", lambda row: f"{row['m']}, {row['n']}, {row['k']}" if "m" in row else ""),
        ("milliseconds", lambda row: seconds(_milli(row["seconds"])) if "seconds" in row else ""),
        ("host's of all", _host),
        ("rate", _rate),
    ]
    rows = result["rows"]
    trained = [row for row in rows if row["part"] == "training"]
    answers, operations = [row for row in rows if "input" in row], [row for row in rows if "what" in row]
    device, peak = result["environment"]["device"], result["peak_tflops"]
    lines = [
        f"**{llama(result)}'s shapes on {device}**, random weights; a large product of matrices runs at "
        f"{peak:.0f} TFLOP/s.",
        "",
        *table(training, trained),
        "",
        *table(latency, answers),
    ]
    if operations:
        lines += ["", *table(single, operations)]
    missing = gpu_owed(result)
    owed = ["", "Rows that `python -m benchmarks.gpu` still owes:", "", *(f"- {name}" for name in missing)]
    return [*lines, *owed] if missing else lines


GPU_PARTS = ("operations", "one layer", "attention", "the model", "rest")
"""Parts of `benchmarks.gpu` whose rows are not of trainings."""
GPU_TRAININGS: dict[str, Callable[[Json], bool]] = {
    "compiled layers": lambda row: row.get("compiled", False),
    "packed steps": lambda row: row["packing"],
    "trainings without checkpointing": lambda row: not row["checkpointing"],
    "post_grouped": lambda row: row["batching"] == "post_grouped",
    "the host's share of the time": lambda row: "host_seconds" in row,
    "PEFT's default": lambda row: row["adapter"] == "dora_peft",
}  # fmt: skip
"""What trainings of a whole run of it hold, and the rows that hold it."""


def gpu_owed(result: Json) -> list[str]:
    """What a whole run of `benchmarks.gpu` measures and `result` lacks."""
    trained = [row for row in result["rows"] if row["part"] == "training"]
    there = {row["part"] for row in result["rows"]}
    owed = [f"the part `{part}`" for part in GPU_PARTS if part not in there]
    return owed + [name for name, holds in GPU_TRAININGS.items() if not any(map(holds, trained))]


def _host(row: Json) -> str:
    return f"{row['host_seconds']['median'] / row['seconds']['median']:.0%}" if "host_seconds" in row else ""


def _milli(values: Json) -> Json:
    return {key: value if key == "n" else value * 1e3 for key, value in values.items()}


def _rate(row: Json) -> str:
    """What a single operation reached, or what it found."""
    if "tflops" in row:
        return f"{row['tflops']:.3g} TFLOP/s"
    if "gigabytes_per_second" in row:
        return f"{row['gigabytes_per_second']:,.0f} GB/s"
    if "kernels" in row:
        shares = sorted(row["kernel_seconds"].items(), key=lambda item: -item[1])
        total = sum(value for _, value in shares)
        kinds = ", ".join(f"{kind} {value / total:.0%}" for kind, value in shares)
        return f"{row['kernels']:,} kernels fill {row['kernels_of_seconds']:.0%}: {kinds}"
    if "difference" in row:
        return f"they differ by {row['difference']:.2g} (the largest is {row['largest']:.2g})"
    return {True: "equal bit for bit", False: "not equal", None: ""}[row.get("equal")]


def drift(result: Json) -> list[str]:
    """Scores of other precisions beside float32."""
    columns: list[Column] = [
        ("computed in", lambda row: row["variant"]),
        ("pairs", lambda row: f"{row['pairs']:,}"),
        ("labels that flip", lambda row: str(row["flips"])),
        ("largest difference", lambda row: f"{row['max']:.2g}"),
        ("mean difference", lambda row: f"{row['mean']:.2g}"),
        ("seconds of one fold", lambda row: seconds(row["seconds"]) if "seconds" in row else ""),
    ]
    intro = (
        f"**Drift of the scores** from float32: every validation pair of {result['folds']} folds, each by its own "
        f"fold's checkpoint and threshold; base model `{result['base_model']}`."
    )
    return [intro, "", *table(columns, result["rows"])]


def latency(result: Json) -> list[str]:
    """A 7B's answers on a CPU."""
    settings = result["settings"]
    columns: list[Column] = [
        ("precision", lambda row: row["precision"]),
        ("input", lambda row: row["input"]),
        ("seconds", lambda row: seconds(row["seconds"])),
        ("floor: the products alone", lambda row: seconds(row["floor"])),
        ("ratio", lambda row: f"{row['ratio']:.2f}"),
        ("GFLOP/s of the products", lambda row: f"{row['gemm_gflops']:,.0f}"),
        ("cores like these for 1 s (derived)", lambda row: f"{math.ceil(row['cores'])}"),
    ]
    measured, layers = settings["layers_measured"], settings["layers"]
    how = "whole" if measured == layers else f"{measured} of {layers} layers measured, extrapolated linearly"
    shares = [
        f"- {precision}, where the time of one pair goes: "
        + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items())
        for precision, kinds in result["breakdown"].items()
    ]
    intro = f"**One answer at Llama-7B's shapes on a CPU**, random weights, {how}, DoRA r=8, model loaded and warm."
    return [intro, "", *table(columns, result["rows"]), "", *shares]


def int8(result: Json) -> list[str]:
    """Libraries for 8-bit products."""
    found = ", ".join(
        f"{name} {version or 'not installed'}" for name, version in result["settings"]["libraries"].items()
    )
    columns: list[Column] = [
        ("tokens", lambda row: str(row["tokens"])),
        ("products", lambda row: row["variant"]),
        ("milliseconds", lambda row: seconds({key: value * 1e3 for key, value in row["seconds"].items()})),
        ("GFLOP/s", lambda row: f"{row['gflops']:,.0f}"),
        ("relative error", lambda row: f"{row['error']:.2%}"),
    ]
    intro = (
        f"**8-bit products**: the seven projections of one Llama-7B layer; {found} ([the choice](../concepts/int8.md))."
    )
    return [intro, "", *table(columns, result["rows"])]


def report(result: Json) -> list[str]:
    """The statistics of a run."""
    settings = result["settings"]
    intro = (
        f"**The statistics of a run** of {settings['folds']} folds, with {settings['draws']:,} bootstrap draws. Every "
        "measurement is a fresh process."
    )
    columns: list[Column] = [
        ("pairs", lambda row: f"{row['pairs']:,}"),
        ("seconds", lambda row: seconds(row["seconds"])),
        ("CPU seconds", lambda row: seconds(row["cpu_seconds"])),
        ("peak memory of the process, GB", lambda row: gigabytes(row, "peak_bytes")),
        ("JSON, kB", lambda row: f"{row['json_bytes'] / 1e3:.0f}"),
    ]
    return [intro, "", *table(columns, result["rows"])]


RENDERERS: dict[str, Callable[[Json], list[str]]] = {
    "layer": layer, "layer_gpu": layer, "fold": fold, "collate": collate, "growth": growth, "batching": batching,
    "overhead": overhead, "scale": scale, "many_folds": many_folds,
    "latency_cli": latency_cli, "load": load, "gpu": gpu, "drift": drift,
    "latency": latency, "int8": int8, "report": report,
}  # fmt: skip


def table(columns: Iterable[Column], rows: Iterable[Json]) -> list[str]:
    """A Markdown table."""
    columns = list(columns)
    lines = [
        [name for name, _ in columns],
        ["---"] * len(columns),
        *([show(row) for _, show in columns] for row in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in lines]


def render(result: Json) -> list[str]:
    """A result as Markdown lines: command and machine, table, bars."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {environment['packages'][name]}" for name in ("torch", "transformers", "peft"))
    machine = f"{environment['processor']}, {environment['device']}"
    if "load_average" in result:
        # At its start: at the end the benchmark's own processes count too.
        machine += f", load {result['load_average']['start']:.1f} at its start"
    if (environment["git"] or {}).get("dirty"):
        machine += ", code with uncommitted changes"
    repeats = result["settings"].get("repeats", 1)
    if repeats > 1:
        machine += f", {repeats} runs of each" if result["benchmark"] in ONE_AFTER_ANOTHER else f", {repeats} rounds"
    if result["settings"].get("one_core"):
        machine += ", CPU seconds of one core"
    lines = [f"`{result['command']}`, {machine}, {versions}", ""]
    lines += [result["note"], ""] if "note" in result else []
    lines += RENDERERS[result["benchmark"]](result)
    if result["bars"]:
        lines.append("")
    for bar in result["bars"]:
        if result["small"]:
            lines.append(f"- {bar['claim']}: {bar['value']:.3g} (small shapes: not held against its bar)")
            continue
        limit = f"at most {bar['at_most']}" if "at_most" in bar else f"at least {bar['at_least']}"
        worst = f" (worst round {bar['worst']:.3g})" if "worst" in bar else ""
        why = f" ({bar['why']})" if "why" in bar else ""
        lines.append(f"- {bar['claim']}: {bar['value']:.3g}{worst}; bar: {limit}: {judgement(bar)}{why}")
    return lines


def judgement(bar: Json) -> str:
    """Whether a bar is met, as the page words it."""
    if not bar["met"]:
        return "**missed**"
    return "met" if bar.get("every_round", True) else "met by the median, **not by every round**"


def section(results: Path = RESULTS) -> str:
    """All tables: the body of the page of the docs."""
    found = {path.stem: read_json(path) for path in sorted(results.glob("*.json")) if path.stem in RENDERERS}
    lines: list[str] = []
    for name in ORDER:
        if name in found:
            lines += [f"## {name}", "", *render(found[name]), ""]
    lines += [f"- {text}" for name, text in OWED.items() if name not in found]
    return "\n".join(lines).strip()


def summary(results: Path = RESULTS) -> str:
    """The few figures of the README."""
    rows = []
    for what, name, claim, unit in SUMMARY:
        file = results / f"{name}.json"
        values = [bar["value"] for bar in (read_json(file)["bars"] if file.is_file() else []) if bar["claim"] == claim]
        rows += [{"what": what, "figure": f"{value:.2g}{unit}"} for value in values]
    return "\n".join(table([("", lambda row: row["what"]), ("measured", lambda row: row["figure"])], rows))


WRITTEN: dict[Path, Callable[[Path], str]] = {
    ROOT / "docs" / "reference" / "benchmarks.md": section,
    ROOT / "README.md": summary,
}
"""The files with markers, and what stands between them."""


def updated(text: str, body: str) -> str:
    """`text` with `body` between the markers."""
    before, found, rest = text.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"the file lacks the markers {START} and {END}")
    return f"{before}{START}\n\n{body}\n\n{END}{after}"


def outdated(results: Path = RESULTS) -> dict[Path, str]:
    """The files that are not what the results give, with what they should hold."""
    texts = {path: path.read_text(encoding="utf-8") for path in WRITTEN}
    renewed = {path: updated(text, WRITTEN[path](results)) for path, text in texts.items()}
    return {path: text for path, text in renewed.items() if text != texts[path]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing, fail if a file is out of date")
    options = arguments.parse_args()
    for path, text in outdated().items():
        if options.check:
            raise SystemExit(f"{path.relative_to(ROOT)} is not what the results give: python -m benchmarks.table")
        write_text(path, text)


if __name__ == "__main__":
    main()
