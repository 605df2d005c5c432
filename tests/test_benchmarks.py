"""The benchmarks run, count what they claim to, and the README holds what they measured. Nothing is timed here."""

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
NAMES = ("layer", "collate", "fold", "growth", "batching", "overhead", "scale", "gpu")
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
@pytest.mark.parametrize("name", ["overhead", "scale"])
def test_what_ray_costs_is_measured_on_real_runs(name, tmp_path):
    """In a process of its own, as it starts Ray."""
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--small", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["bars"]) == 1
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
