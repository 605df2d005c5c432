"""The benchmarks run, count what they claim to, and the docs hold what they measured. Nothing is timed here."""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import users_environment

pytest.importorskip("benchmarks", reason="the benchmarks are in the checkout, not in the wheel")

import benchmarks
from benchmarks import table
from benchmarks.harness import Bar, interleaved, spread

ROOT = Path(benchmarks.__file__).parent.parent
NAMES = (
    "layer", "collate", "fold", "growth", "batching", "overhead", "scale", "gpu",
    "latency_cli", "load", "drift", "latency", "int8", "report",
)  # fmt: skip
SPREAD = {"median", "min", "max", "n"}


MISSED: set[tuple[str, str]] = {
    ("gpu", "share of the 6N roofline, DoRA of raycv, checkpointing on, micro-batches of 8"),
    ("gpu", "times the time of PEFT's LoRA, checkpointing on, micro-batches of 8"),
    ("gpu", "times faster than the better PEFT DoRA, checkpointing on, micro-batches of 8"),
    ("gpu", "share of the 6N roofline, DoRA of raycv, checkpointing on, micro-batches of 32"),
}
"""Claims of full results that miss their bar, each a name and a claim: the docs show them."""


def small(name, folder, monkeypatch, *more):
    """The JSON of a small run in this process."""
    module = __import__(f"benchmarks.{name}", fromlist=["main"])
    out = folder / f"{name}.json"
    monkeypatch.setattr(sys, "argv", [name, "--small", "--repeats", "1", "--out", str(out), *more])
    module.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["benchmark"] == name
    assert result["small"] is True
    assert {"python", "processor", "packages", "git", "device"} <= set(result["environment"])
    assert str(ROOT) not in out.read_text(encoding="utf-8")
    assert table.render(result)
    return result


@pytest.mark.long
def test_report_measures_each_size_in_a_process_of_its_own(tmp_path, monkeypatch):
    result = small("report", tmp_path, monkeypatch)
    assert [row["pairs"] for row in result["rows"]] == [540, 1080]
    assert all(row["peak_bytes"] > 50e6 and row["json_bytes"] > 50e3 for row in result["rows"])
    assert len(result["bars"]) == 3


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


def test_collate_meets_its_bars_and_shares_prefixes(tmp_path, monkeypatch):
    from benchmarks import collate

    result = small("collate", tmp_path, monkeypatch)
    for size in (8, 32):
        ratio = {row["batching"]: row["ratio"] for row in result["rows"] if row["micro_batch"] == size}
        assert list(ratio) == ["padded to 512", collate.DYNAMIC, collate.SORTED, "shuffled", "post_grouped"]
        padded, dynamic, by_length, shuffled, grouped = ratio.values()
        assert padded > dynamic >= by_length > shuffled >= 1 > 0.5 > grouped
        assert shuffled <= 1.2
    assert [bar["met"] for bar in result["bars"]] == [True, True]
    assert sorted(result["settings"]["prefix_quantiles"]) == result["settings"]["prefix_quantiles"]


@pytest.mark.slow
def test_fold_computes_fewer_tokens_and_the_same_losses(tmp_path, monkeypatch):
    result = small("fold", tmp_path, monkeypatch)
    rows = {row["variant"]: row for row in result["rows"]}
    assert (
        rows["trainer_512"]["epoch_tokens"] > rows["trainer_dynamic"]["epoch_tokens"] > rows["shuffled"]["epoch_tokens"]
    )
    assert rows["shuffled"]["epoch_tokens"] > rows["post_grouped"]["epoch_tokens"]
    # One batch with one post that fills 512: padding to the longest saves nothing.
    validated = {variant: row["validation_tokens"] for variant, row in rows.items()}
    assert validated["trainer_512"] == validated["trainer_dynamic"] == 512 * 18
    assert validated["shuffled"] == validated["post_grouped"] < 0.3 * validated["trainer_512"]
    pairs = result["settings"]["train_pairs"] + result["settings"]["validation_pairs"]
    assert rows["trainer_512"]["epoch_tokens"] == 512 * pairs
    assert result["parity"]["largest_difference"] < 1e-6
    assert rows["trainer_by_length"]["epoch_tokens"] <= rows["trainer_dynamic"]["epoch_tokens"]
    assert rows["trainer_lora"]["epoch_tokens"] == rows["trainer_by_length"]["epoch_tokens"]
    assert rows["trainer_defaults"]["epoch_tokens"] == rows["trainer_512"]["epoch_tokens"]
    assert len(result["bars"]) == 6
    (share,) = (bar["value"] for bar in result["bars"] if "product" in bar["claim"])
    assert 0 < share < 1
    for row in rows.values():
        assert (len(row["epoch_rounds"]), len(row["validation_rounds"])) == (1, 1)
        assert row["epoch_seconds"]["median"] > row["validation_seconds"]["median"] > 0
        assert row["epoch_tokens"] > row["validation_tokens"]
    assert result["settings"]["validation_pairs"] == 18
    assert result["settings"]["eval_batch"] == 36


def test_the_peer_validates_in_batches_as_large_as_raycvs():
    from benchmarks.corpus import encode, synthetic
    from benchmarks.fold import SMALL, Peer

    encoded = encode(synthetic(14, words_mean=20))
    peer = Peer(SMALL, encoded, np.arange(32), "train.eval_batch_size=17", padded=False)
    assert peer.trainer.args.per_device_eval_batch_size == 17


@pytest.mark.slow
def test_losses_are_those_of_hugging_faces_trainer_for_twenty_steps():
    from benchmarks.corpus import encode, synthetic
    from benchmarks.fold import SMALL, parity

    encoded = encode(synthetic(72, words_mean=20))
    compared = parity(encoded, SMALL, np.arange(20 * 32))
    assert compared["steps"] == len(compared["trainer"]) == 20
    assert compared["largest_difference"] < 1e-6
    assert np.std(compared["raycv"]) > 1e-3, "a flat curve would show nothing"


def test_what_grows_is_the_same_posts_and_nothing_is_cut():
    from benchmarks.growth import data_sets

    grown = data_sets(4, 100)
    base = grown["base"]
    own = base.lengths - shortest_prompt()
    for times in (2, 4):
        np.testing.assert_array_equal(grown[f"pairs x{times}"].lengths, np.tile(base.lengths, times))
        np.testing.assert_array_equal(grown[f"pairs x{times}"].input_ids, np.tile(base.input_ids, (times, 1)))
        assert len(np.unique(grown[f"pairs x{times}"].post_of_pair)) == 4 * times
    # Words at the seam may become other tokens.
    np.testing.assert_allclose(grown["post length x2"].lengths - base.lengths, own, rtol=0.05, atol=3)
    assert grown["post length x2"].lengths.max() < 512
    assert len(grown["criteria 9 -> 27"].lengths) == 3 * len(base.lengths)


def shortest_prompt():
    """Tokens of the prompts of a post that has hardly any, [4 * 9]."""
    from benchmarks.corpus import encode, synthetic

    few = synthetic(4, words_mean=20)
    return encode(dataclasses.replace(few, posts=dict.fromkeys(few.posts, "a"))).lengths


@pytest.mark.slow
def test_growth_is_linear_in_pairs_and_less_in_criteria(tmp_path, monkeypatch):
    rows = {(row["change"], row["batching"]): row for row in small("growth", tmp_path, monkeypatch)["rows"]}
    for batching in ("shuffled", "post_grouped"):
        base = rows["base", batching]
        for times in (2, 4):
            grown = rows[f"pairs x{times}", batching]
            assert grown["pairs"] == times * base["pairs"]
            assert grown["validation_tokens"] == times * base["validation_tokens"]
        assert rows["criteria 9 -> 27", batching]["pairs"] == 3 * base["pairs"]
        assert rows["criteria 9 -> 27", batching]["validation_tokens"] < 3 * base["validation_tokens"]
    assert rows["base", "post_grouped"]["epoch_tokens"] < rows["base", "shuffled"]["epoch_tokens"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_batching_continues_after_a_kill_where_it_stopped(tmp_path):
    out = tmp_path / "batching.json"
    command = [sys.executable, "-m", "benchmarks.batching", "--small", "--mixed", "1", "--processes", "1"]
    command += ["--out", str(out), "--repeats"]
    with subprocess.Popen([*command, "50"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not out.is_file() or len(json.loads(out.read_text(encoding="utf-8"))["rows"]) < 2:
            assert process.poll() is None, "it ended before it had two rows"
            time.sleep(0.2)
        process.kill()
    before = json.loads(out.read_text(encoding="utf-8"))["rows"]
    count = len(before) + 1
    assert count < 50
    done = subprocess.run([*command, str(count)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["rows"][: len(before)] == before, "nothing was trained twice"
    assert [row["replicate"] for row in result["rows"]] == list(range(count))
    assert ["mixed" in row for row in result["rows"]] == [True] + [False] * (count - 1)
    found, means = result["paired"]["post_grouped"]["roc_auc"], result["means"]
    difference = means["post_grouped"]["roc_auc"] - means["shuffled"]["roc_auc"]
    assert (found["pairs"], found["mean"]) == (count, pytest.approx(difference))
    assert found["low"] < difference < found["high"]
    assert result["settings"]["margin"] == 0.005
    assert table.render(result)


@pytest.mark.parametrize("key", ["posts", "overrides", "base"])
def test_batching_does_not_go_on_from_rows_of_other_settings(key, tmp_path):
    from benchmarks.batching import _done
    from benchmarks.harness import Result

    arguments = argparse.Namespace(out=tmp_path / "batching.json", small=True, repeats=1)
    settings = {"posts": 3, "overrides": ["train.lr=1"], "base": "a"}
    before = Result("batching", arguments, **settings)
    before.add({"replicate": 0})
    now = Result("batching", arguments, **settings)
    assert _done(now, settings) == [{"replicate": 0}]
    written = json.loads(arguments.out.read_text(encoding="utf-8"))
    written["settings"][key] = "another"
    arguments.out.write_text(json.dumps(written), encoding="utf-8")
    assert _done(now, settings) == []


def test_post_grouped_is_harmless_only_if_a_loss_that_matters_is_ruled_out():
    from benchmarks.batching import is_harmless

    assert is_harmless({"low": -0.004, "high": 0.003})
    assert not is_harmless({"low": -0.013, "high": 0.023}), "it holds zero, and a loss of a point of F1"
    assert is_harmless({"low": 0.001, "high": 0.006}), "a gain loses nothing"


def test_the_interval_is_that_of_a_paired_t_test():
    from benchmarks.batching import paired

    rows = [
        {"shuffled": {"f1": 0.5 + number / 100}, "post_grouped": {"f1": 0.5 + number / 100 + number / 50}}
        for number in range(5)
    ]
    found = paired([*rows, {"shuffled": {"f1": 0.1}}], "f1")
    assert found["mean"] == pytest.approx(0.04)
    # By hand: t(0.975, 4) = 2.776, variance of 0, .02, .04, .06, .08 = .001, over 5.
    assert found["high"] - found["mean"] == pytest.approx(2.776 * (0.001 / 5) ** 0.5, rel=1e-3)
    assert found["needed"] == 154, "(1.96 * 0.0316 / 0.005)^2"


def test_mixed_groups_three_criteria_of_a_post_and_each_pair_once():
    from benchmarks.batching import in_parts
    from benchmarks.corpus import encode, synthetic

    encoded = encode(synthetic(4))
    parts = in_parts(encoded, seed=1).post_of_pair
    assert sorted(np.bincount(np.unique(parts, return_inverse=True)[1])) == [3] * 12
    assert all(len(set(encoded.post_of_pair[parts == part])) == 1 for part in parts)
    assert not np.array_equal(parts, in_parts(encoded, seed=2).post_of_pair)


def small_process(name, folder, *more):
    """The JSON of a small run in a process of its own, as it starts Ray."""
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--small", "--repeats", "1", "--out", str(out), *more]
    environment = users_environment()
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert str(folder) not in out.read_text(encoding="utf-8")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert table.render(result)
    return result


def test_the_lines_of_a_run_say_when_its_folds_started_and_were_done(tmp_path):
    from benchmarks.overhead import beside, watched

    lines = ["[0:00] fold 0: starting", "fold 1: starting", "fold 1: epoch 1/1: done with it", "fold 1: done", "{}"]
    printed = [*lines, "[0:01] fold 0: done"]
    code = f"import time\nfor line in {printed!r}:\n    time.sleep(0.02)\n    print(line, flush=True)"
    seconds, marks, said = watched([sys.executable, "-c", code], tmp_path)
    assert said == printed
    assert set(marks) == {0, 1}
    assert marks[0]["starting"] < marks[1]["starting"] < marks[1]["done"] <= marks[0]["done"]
    assert seconds["before"] + seconds["folds"] + seconds["after"] == pytest.approx(seconds["wall"])
    assert seconds["folds"] == pytest.approx(marks[0]["done"] - marks[0]["starting"])
    given = {"wall": 60.0, "before": 10.0, "folds": 45.0, "after": 5.0}
    found = beside(given, loops=10.0, folds=5, in_flight=2)
    assert (found["per_fold"], found["wave"]) == (11.0, pytest.approx(40 / 3))


@pytest.fixture(scope="module")
def overhead(tmp_path_factory):
    """A small run of `benchmarks.overhead`, and the folder of the run of raycv that it made."""
    folder = tmp_path_factory.mktemp("overhead")
    result = small_process("overhead", folder, "--folder", str(folder))
    return result, folder / "runs" / "2-2-0"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_overhead_measures_phases_of_real_folds_beside_a_plain_wave(overhead):
    result, _ = overhead
    ours, plain = result["rows"]
    assert plain["case"].endswith("written plainly")
    phases = {key: value["median"] for key, value in ours.items() if key.startswith("phase_")}
    assert set(phases) == {
        f"phase_{name}" for name in ("processes", "imports", "model", "loop", "checkpoint", "reports")
    }
    assert min(phases.values()) > 0
    # The phases of a fold are parts of the time that the two folds took together.
    assert sum(phases.values()) < ours["folds"]["median"]
    assert len(result["bars"]) == 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_scale_runs_folds_that_sleep_at_once(tmp_path):
    result = small_process("scale", tmp_path)
    (row,) = result["rows"]
    assert (row["workers"], row["waves"]) == (2, 1)
    # Two folds in two places: one after the other would be half.
    assert 0.5 < row["efficiency"]["median"] <= 1
    assert row["absolute"]["median"] < row["efficiency"]["median"]


@pytest.mark.slow
@pytest.mark.ray
def test_many_folds_measures_the_driver_and_what_mlflow_has(tmp_path):
    (row,) = small_process("many_folds", tmp_path)["rows"]
    assert (row["folds"], row["at_once"], row["mlflow_children"]) == (6, 3, 6)
    assert 0 <= row["gap"] <= row["longest_gap"]
    assert row["memory_most"] >= row["memory_start"] > 0
    # At least the metrics of three epochs of each fold.
    assert row["mlflow_records"] > 6 * 3 * 7


def test_start_up_is_what_passes_before_a_fold_in_its_place():
    from benchmarks.scale import chains, facts, row

    # Two places; fold 1 ends first and fold 2 takes its place.
    started = {0: 1.0, 1: 1.5, 2: 14.0}
    done = {0: 16.0, 1: 13.0, 2: 31.0}
    slept = {
        0: {"began": 4.0, "ended": 14.5},
        1: {"began": 2.0, "ended": 12.0},
        2: {"began": 20.0, "ended": 30.0},
    }
    places = chains(started, done)
    assert places == [[0], [1, 2]]
    found = facts(0.0, 32.0, places, slept)
    assert found == {"wall": 32.0, "beyond": 20.0, "first": 4.0, "later": 8.0}
    shown = row(3, 2, 10.0, [found])
    assert shown["efficiency"]["median"] == 1
    assert shown["absolute"]["median"] == 20 / 32
    assert shown["of_an_hour"]["median"] == pytest.approx(7200 / 7212)
    # Three folds that wait for each other, where two could have gone at once.
    alone = chains({0: 0.0, 1: 10.0, 2: 20.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    slept = {fold: {"began": 10.0 * fold, "ended": 10.0 * fold + 10} for fold in range(3)}
    assert row(3, 2, 10.0, [facts(0.0, 30.0, alone, slept)])["efficiency"]["median"] == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_scorer_is_asked_by_processes_and_under_load(overhead, tmp_path):
    from benchmarks.serving import scorer

    _, run = overhead
    folder = run.parent.parent
    with scorer(folder, run.name, f"tracking.uri=sqlite:///{folder / 'inference.db'}") as url:
        given = ("--run", str(run), "--server", url)
        latency = small_process("latency_cli", tmp_path, *given)
        load = small_process("load", tmp_path, *given)
    assert [row["n"] for row in latency["rows"]] == [2] * 6
    assert len(latency["bars"]) == 3
    assert [row["answers"] > 0 for row in load["rows"] if "answers" in row] == [True, True]
    assert (len(load["bars"]), load["bars"][0]["met"]) == (4, True)
    assert 0 < load["logging"]["in_mlflow"] <= load["logging"]["asked"] + 100


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gpu_runs_small_and_needs_no_orchestration(tmp_path):
    from benchmarks.gpu import LAST, OTHERS, PARTS

    code = (
        "import sys, json; from benchmarks.gpu import main; main();"
        "print(json.dumps([name for name in sys.modules if name in "
        "('ray', 'mlflow', 'hydra', 'omegaconf', 'raycv.config.schema', 'raycv.config.command_line')]))"
    )
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-c", code, "--small", "--repeats", "1", "--seconds", "3000", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["skipped"] == []
    assert {row["part"] for row in result["rows"]} == set(PARTS) - {"checkpointing", "without"} | {"training"}
    for row in result["rows"]:
        if "host_seconds" in row:
            assert 0 < row["host_seconds"]["median"] <= row["seconds"]["median"]
    assert all("host_seconds" in row for row in result["rows"] if "input" not in row and "what" not in row)
    (compared,) = (row for row in result["rows"] if "difference" in row)
    assert compared["difference"] < 1e-5 < compared["largest"]
    assert [row["equal"] for row in result["rows"] if "equal" in row] == [True]
    training = [row for row in result["rows"] if row["part"] == "training"]
    assert len(training) == 7 + len(OTHERS) + len(LAST)
    assert table.gpu_owed(result) == []
    assert result["packing"].startswith("logits equal")
    assert [(bar["claim"].split(",")[0], bar["claim"].rpartition(" ")[2]) for bar in result["bars"]] == [
        ("share of the 6N roofline", "8"), ("times the time of PEFT's LoRA", "8"),
        ("times faster than the better PEFT DoRA", "8"), ("share of the 6N roofline", "32"),
        ("times the time of PEFT's LoRA", "32"), ("share of the 4N roofline", "32"),
    ]  # fmt: skip
    assert {row["checkpointing"]: row["flops_per_n_token"] for row in training} == {True: 6, False: 4}
    computed = {
        (row["adapter"], row["batching"], row["micro_batch"], row["compiled"]): row["computed_tokens"]
        for row in training
        if row["checkpointing"]
    }
    assert computed["dora_raycv", "post_grouped", 32, False] < computed["dora_raycv", "shuffled", 32, False]
    assert computed["dora_raycv", "shuffled", 8, False] == computed["lora", "shuffled", 8, False]
    assert {row["adapter"] for row in result["rows"] if "input" in row} == {"lora", "dora_raycv"}
    assert table.render(result)


@pytest.mark.long
def test_a_gpu_run_names_what_fails_or_has_no_time_and_keeps_all_else(tmp_path, monkeypatch):
    from benchmarks import gpu
    from benchmarks.harness import Result

    device = torch.device("cpu")
    setting = gpu.Setting(gpu.SMALL, device, shrink=8)
    real = gpu.Work.train

    def train(work, steps=None):
        if not work.model.base_model.model.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        real(work, 1)

    monkeypatch.setattr(gpu.Work, "train", train)
    result = Result("gpu", argparse.Namespace(out=tmp_path / "gpu.json", small=True, repeats=2))
    result.add({"part": "operations", "what": "large", "tflops": 0.1})
    plan = gpu.Plan(result, device, 3000)
    ours, lora = gpu.Case("dora_raycv", True), gpu.Case("lora", True)
    plan.train("checkpointing", setting, (ours, gpu.Case("dora_raycv", False), lora), rounds=2)
    plan.part("attention", iter([("a fault", lambda: [][0]), ("a row", lambda: [{"what": "a row"}])]))
    late = gpu.Plan(result, device, 0)
    late.train("rest", setting, (lora,))
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert plan.skipped[0].endswith("out of memory")
    assert "checkpointing=False" in plan.skipped[0]
    assert plan.skipped[1:] == ["a fault: IndexError: list index out of range"], "a fault is not tried again"
    assert written["skipped"] == late.skipped
    assert [text.endswith("no time") for text in late.skipped] == [True]
    assert [(row["part"], row.get("adapter"), len(row.get("rounds", []))) for row in written["rows"]] == [
        ("operations", None, 0), ("training", "dora_raycv", 2), ("training", "lora", 2), ("attention", None, 0),
    ]  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError), setting.adapted(ours):
        raise torch.OutOfMemoryError
    assert not any(hasattr(module, "lora_A") for module in setting._base.modules()), "the adapter is gone"


def test_a_gpu_result_names_the_rows_that_it_lacks():
    result = json.loads((table.RESULTS / "gpu.json").read_text(encoding="utf-8"))
    assert "the part `attention`" in table.gpu_owed(result)
    assert "compiled layers" in table.gpu_owed(result)
    assert {f"- {name}" for name in table.gpu_owed(result)} < set(table.render(result))


@pytest.mark.long
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


@pytest.mark.long
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
def test_drift_of_a_real_run(overhead, tmp_path):
    _, run = overhead
    result = small_process("drift", tmp_path, "--run", str(run))
    rows = {row["variant"]: row for row in result["rows"]}
    assert {"fp32", "bf16", "predictions.csv", "PEFT, unmerged DoRA, fp32"} <= set(rows)
    assert {row["pairs"] for row in rows.values()} == {14 * 9}
    for exact in ("predictions.csv", "PEFT, unmerged DoRA, fp32"):
        assert rows[exact]["flips"] == 0
        assert rows[exact]["max"] < 1e-5
    assert 1e-5 < rows["bf16"]["max"] < 0.1


def test_docs_and_readme_hold_what_the_results_give():
    assert list(table.outdated()) == [], "python -m benchmarks.table"
    # A claim that no result has any more would be missing in silence.
    assert table.summary().count("\n") == len(table.SUMMARY) + 1


def test_results_are_of_full_runs_that_meet_their_bars_and_name_no_place():
    paths = sorted(table.RESULTS.glob("*.json"))
    assert {path.stem for path in paths} >= {*NAMES, "layer_gpu"}
    missed = set()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        result = json.loads(text)
        assert (result["benchmark"], result["small"]) == (path.stem, False)
        assert '"/' not in text, f"{path.name} names a path of the machine"
        assert {"start", "end"} == set(result["load_average"])
        for bar in result["bars"]:
            met = bar["value"] <= bar["at_most"] if "at_most" in bar else bar["value"] >= bar["at_least"]
            assert met == bar["met"]
            missed |= set() if met else {(path.stem, bar["claim"])}
    assert missed == MISSED


def test_figures_are_owed_until_there_are_some(tmp_path):
    assert all(text in table.section(tmp_path) for text in table.OWED.values())
    with pytest.raises(SystemExit, match="lacks the markers"):
        table.updated("no markers", "")


def test_bars_and_spread():
    assert Bar("x", 3.0, 3).judged()["met"]
    assert not Bar("x", 1.16, 1.15, at_most=True).judged()["met"]
    rounds = Bar.of_rounds("x", [2.4, 2.6, 2.7], 2.5).judged()
    assert (rounds["value"], rounds["met"], rounds["worst"], rounds["every_round"]) == (2.6, True, 2.4, False)
    assert table.judgement(rounds) == "met by the median, **not by every round**"
    assert Bar.of_rounds("x", [19.0, 19.5, 20.1], 20, at_most=True).judged()["worst"] == 20.1
    assert table.judgement(Bar("x", 2.0, 3).judged()) == "**missed**"
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}


def test_variants_take_turns_and_none_is_always_first():
    calls = []
    rounds = []

    def after_round(seconds):
        rounds.append([len(values) for values in seconds.values()])

    interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, after_round=after_round)
    assert calls == ["a", "b", "a", "b", "b", "a"]
    assert rounds == [[1, 1], [2, 2]]
