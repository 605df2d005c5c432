"""The benchmarks run, count what they claim to, and the README holds what they measured. Nothing is timed here."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are in the checkout, not in the wheel")

import benchmarks
from benchmarks import table
from benchmarks.harness import Bar, interleaved, spread

ROOT = Path(benchmarks.__file__).parent.parent
NAMES = (
    "layer", "collate", "fold", "growth", "batching", "overhead", "scale", "gpu",
    "latency_cli", "load", "drift", "latency", "int8",
)  # fmt: skip
SPREAD = {"median", "min", "max", "n"}


def small(name, folder, monkeypatch):
    """The JSON of a small run in this process."""
    module = __import__(f"benchmarks.{name}", fromlist=["main"])
    out = folder / f"{name}.json"
    monkeypatch.setattr(sys, "argv", [name, "--small", "--repeats", "1", "--out", str(out)])
    module.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["benchmark"] == name
    assert result["small"] is True
    assert {"python", "processor", "packages", "git", "device"} <= set(result["environment"])
    assert str(ROOT) not in out.read_text(encoding="utf-8")
    assert table.render(result)
    return result


@pytest.mark.slow
def test_layer_counts_6n_for_raycv_and_twice_that_for_peft(tmp_path, monkeypatch):
    result = small("layer", tmp_path, monkeypatch)
    flops = {(row["dtype"], row["tokens"], row["variant"]): row["flops_per_n_token"] for row in result["rows"]}
    assert {variant for _, _, variant in flops} >= {"lora", "dora_peft", "dora_raycv"}
    for (dtype, tokens, variant), count in flops.items():
        lora = flops[dtype, tokens, "lora"]
        assert lora >= 6
        if variant == "dora_raycv":
            assert count < lora + 0.5, "6N and the norm's 16N a step"
        if variant.startswith("dora_peft"):
            # A second product with the base weights in the forward, the recompute and the backward: 6 more.
            assert count > lora + 5.9
    assert all(set(row["seconds"]) == SPREAD for row in result["rows"])
    (peak,) = (row for row in result["rows"] if "peak_bytes" in row)
    assert peak["peak_bytes"] > 0
    assert len(result["bars"]) == 2


def test_collate_meets_its_bar_and_shares_prefixes(tmp_path, monkeypatch):
    result = small("collate", tmp_path, monkeypatch)
    ratio = {row["batching"]: row["ratio"] for row in result["rows"]}
    assert ratio["pad_to_512"] > ratio["dynamic"] > ratio["shuffled"] >= 1 > 0.5 > ratio["post_grouped"]
    assert ratio["shuffled"] <= 1.2
    assert [bar["met"] for bar in result["bars"]] == [True]
    assert sorted(result["settings"]["prefix_quantiles"]) == result["settings"]["prefix_quantiles"]


@pytest.mark.slow
def test_fold_computes_fewer_tokens_and_the_same_losses(tmp_path, monkeypatch):
    result = small("fold", tmp_path, monkeypatch)
    rows = {row["variant"]: row for row in result["rows"]}
    for tokens in ("epoch_tokens", "validation_tokens"):
        assert rows["trainer_512"][tokens] > rows["trainer_dynamic"][tokens] >= rows["shuffled"][tokens]
        assert rows["shuffled"][tokens] >= rows["post_grouped"][tokens]
    pairs = result["settings"]["train_pairs"] + result["settings"]["validation_pairs"]
    assert rows["trainer_512"]["epoch_tokens"] == 512 * pairs
    assert result["parity"]["largest_difference"] < 1e-5
    assert len(result["bars"]) == 4


@pytest.mark.slow
def test_losses_are_those_of_hugging_faces_trainer_for_twenty_steps():
    from benchmarks.corpus import encode, synthetic
    from benchmarks.fold import SMALL, parity

    encoded = encode(synthetic(72, words_mean=20))
    compared = parity(encoded, SMALL, np.arange(20 * 32))
    assert compared["steps"] == len(compared["trainer"]) == 20
    assert compared["largest_difference"] < 1e-5
    assert np.std(compared["raycv"]) > 1e-3, "a flat curve would show nothing"


@pytest.mark.slow
def test_growth_is_linear_in_pairs_and_less_in_criteria(tmp_path, monkeypatch):
    rows = {(row["change"], row["batching"]): row for row in small("growth", tmp_path, monkeypatch)["rows"]}
    for batching in ("shuffled", "post_grouped"):
        base = rows["base", batching]
        assert rows["pairs x4", batching]["pairs"] == 4 * base["pairs"]
        assert rows["criteria 9 -> 27", batching]["pairs"] == 3 * base["pairs"]
        assert rows["criteria 9 -> 27", batching]["validation_tokens"] < 3 * base["validation_tokens"]
    assert rows["base", "post_grouped"]["epoch_tokens"] < rows["base", "shuffled"]["epoch_tokens"]


@pytest.mark.slow
def test_batching_pairs_every_fold_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    result = small("batching", tmp_path, monkeypatch)
    assert result["paired"]["f1"]["pairs"] == 15
    assert len(result["rows"]) == 30
    difference = result["means"]["post_grouped"]["f1"] - result["means"]["shuffled"]["f1"]
    assert result["paired"]["f1"]["mean"] == pytest.approx(difference)
    assert result["paired"]["f1"]["low"] < difference < result["paired"]["f1"]["high"]
    again = small("batching", tmp_path, monkeypatch)
    assert again["rows"] == result["rows"], "nothing was trained twice"


def test_the_interval_is_wider_than_that_of_independent_folds():
    from benchmarks.batching import paired

    rows = [
        {"seed": 0, "fold": fold, "batching": mode, "f1": 0.5 + fold / 100 + (mode == "post_grouped") * fold / 50}
        for fold in range(5)
        for mode in ("shuffled", "post_grouped")
    ]
    found = paired(rows, "f1")
    assert found["mean"] == pytest.approx(0.04)
    # By hand: t(0.975, 4) = 2.776, variance of 0, .02, .04, .06, .08 = .001, times 1/5 + 1/4.
    assert found["high"] - found["mean"] == pytest.approx(2.776 * (0.45 * 0.001) ** 0.5, rel=1e-3)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "bars"), [("overhead", 1), ("scale", 1), ("latency_cli", 1), ("load", 4)])
def test_what_ray_costs_is_measured_on_real_runs(name, bars, tmp_path):
    """In a process of its own, as it starts Ray."""
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--small", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["bars"]) == bars
    assert table.render(result)


@pytest.mark.slow
def test_gpu_runs_small_and_needs_no_orchestration(tmp_path):
    code = (
        "import sys, json; from benchmarks.gpu import main; main();"
        "print(json.dumps([name for name in sys.modules if name in "
        "('ray', 'mlflow', 'hydra', 'omegaconf', 'raycv.config', 'raycv.cli')]))"
    )
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-c", code, "--small", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    result = json.loads(out.read_text(encoding="utf-8"))
    training = [row for row in result["rows"] if row["part"] == "training"]
    assert len(training) == 7
    assert result["skipped"] == []
    assert result["sharing"].startswith("logits equal")
    computed = {(row["adapter"], row["batching"], row["checkpointing"]): row["computed_tokens"] for row in training}
    assert computed["dora_raycv", "post_grouped", True] < computed["dora_raycv", "shuffled", True]
    assert computed["dora_raycv", "shuffled", True] == computed["lora", "shuffled", True]
    assert {row["adapter"] for row in result["rows"] if row["part"] == "latency"} == {
        row["adapter"] for row in training
    }
    assert table.render(result)


def test_latency_runs_small_and_holds_the_answer_against_the_products(tmp_path, monkeypatch):
    result = small("latency", tmp_path, monkeypatch)
    rows = {(row["precision"], row["input"]): row for row in result["rows"]}
    assert len(rows) == 6
    for (precision, _), row in rows.items():
        assert set(row["seconds"]) == set(row["floor"]) == SPREAD
        assert row["ratio"] == pytest.approx(row["seconds"]["median"] / row["floor"]["median"])
        assert row["cores"] == row["seconds"]["median"] * result["settings"]["threads"]
        assert sum(result["breakdown"][precision].values()) == pytest.approx(1)
        # 2 N T: three layers of four square and three wide projections.
        flops = 2 * 3 * (4 * 64 * 64 + 3 * 64 * 172) * row["tokens"]
        assert row["gemm_gflops"] * 1e9 * row["floor"]["median"] == pytest.approx(flops)
    assert {row["tokens"] for row in result["rows"]} == {16, 32, 16 + 9 * 9}
    assert len(result["bars"]) == len(rows)
    result["small"] = False
    for bar, missed in zip(result["bars"], "\n".join(table.render(result)).splitlines()[-len(rows) :], strict=True):
        assert ("**missed** (of one pair's time attention " in missed) == (not bar["met"])
    assert not all(bar["met"] for bar in result["bars"]), "tiny products are no floor"


def test_a_model_that_does_not_fit_is_measured_by_fewer_layers(tmp_path, monkeypatch):
    from benchmarks import latency
    from benchmarks.models import LLAMA_7B

    monkeypatch.setattr(latency, "_available", lambda: 64e9)
    assert latency.fitting(LLAMA_7B) == LLAMA_7B
    monkeypatch.setattr(latency, "_available", lambda: 8e9)
    assert 5 < latency.fitting(LLAMA_7B).layers < 15, "0.4 GB a layer beside 3.5 GB"
    monkeypatch.setattr(latency, "fitting", lambda shape, most: dataclasses.replace(shape, layers=1))
    result = small("latency", tmp_path, monkeypatch)
    assert "1 of 3 layers measured, extrapolated linearly" in "\n".join(table.render(result))
    row = result["rows"][0]
    flops = 2 * 3 * (4 * 64 * 64 + 3 * 64 * 172) * row["tokens"]
    assert row["gemm_gflops"] * 1e9 * row["floor"]["median"] == pytest.approx(flops)


def test_int8_compares_what_is_installed(tmp_path, monkeypatch):
    result = small("int8", tmp_path, monkeypatch)
    rows = {row["variant"]: row for row in result["rows"]}
    assert {"bf16, torch (not int8)", "int8, raycv on torch._int_mm"} <= set(rows)
    assert all(0 < row["error"] < 0.05 for row in rows.values())


def test_drift_counts_labels_on_the_other_side_of_each_folds_threshold():
    from benchmarks.drift import compared

    folds = [
        {"fp32": np.array([0.1, 0.4, 0.9]), "int8": np.array([0.1, 0.5, 0.8])},
        {"fp32": np.array([0.4, 0.4]), "int8": np.array([0.6, 0.4])},
    ]
    found = compared(folds, [0.5, 0.7], "int8")
    assert (found["pairs"], found["flips"]) == (5, 1)
    assert found["max"] == pytest.approx(0.2)
    assert found["mean"] == pytest.approx(0.08)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_drift_of_a_real_run(tmp_path):
    """In a process of its own, as it starts Ray."""
    out = tmp_path / "drift.json"
    command = [sys.executable, "-m", "benchmarks.drift", "--small", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["variant"]: row for row in result["rows"]}
    assert {"fp32", "bf16", "predictions.csv", "PEFT, unmerged DoRA, fp32"} <= set(rows)
    assert {row["pairs"] for row in rows.values()} == {990}
    for exact in ("predictions.csv", "PEFT, unmerged DoRA, fp32"):
        assert rows[exact]["flips"] == 0
        assert rows[exact]["max"] < 1e-5
    assert 1e-5 < rows["bf16"]["max"] < 0.1
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


def test_readme_holds_what_the_results_give():
    text = table.README.read_text(encoding="utf-8")
    assert table.updated(text) == text, "python -m benchmarks.table"


def test_results_are_of_full_runs_and_name_no_place():
    paths = sorted(table.RESULTS.glob("*.json"))
    assert {path.stem for path in paths} >= {"collate", "fold"}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        result = json.loads(text)
        assert (result["benchmark"], result["small"]) == (path.stem, False)
        assert '"/' not in text, f"{path.name} names a path of the machine"


def test_figures_are_owed_until_there_are_some(tmp_path):
    assert all(text in table.section(tmp_path) for text in table.OWED.values())
    with pytest.raises(SystemExit, match="lacks the markers"):
        table.updated("no markers", tmp_path)


def test_bars_and_spread():
    assert Bar("x", 3.0, 3).judged()["met"]
    assert not Bar("x", 1.16, 1.15, at_most=True).judged()["met"]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}


def test_variants_take_turns_and_none_is_always_first():
    calls = []
    interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "a", "b", "b", "a"]
