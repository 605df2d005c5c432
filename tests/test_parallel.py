"""A fold trained by two workers (gloo) is the fold trained by one: same steps, same metrics, same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from support.commands import raycv
from support.toy import Recorder, Toy, toy_base, train_config

from raycv.training.forward import RowScorer
from raycv.training.loop import FoldTrainer

# 29 pairs in steps of 8: the last step has 5, and post-grouped ones hold fewer posts than workers now and then.
TRAIN, VAL = np.arange(29), np.arange(30, 48)


CASES: dict[str, dict[str, Any]] = {
    "shuffled": {"imbalance": "weighted_loss"},
    "post_grouped": {"imbalance": "weighted_loss", "batching": "post_grouped"},
    "bf16": {"imbalance": "weighted_loss", "batching": "post_grouped", "epochs": 1},
    "dropout": {"epochs": 1},
}


def train(folder: Path, case: str, rank: int = 0) -> dict[str, Any]:
    """Trains the toy fold in this process, as one of its workers if torch.distributed is up."""
    toy = Toy(toy_base(folder / case))
    bf16 = case == "bf16"
    model = toy.model(dtype="bfloat16" if bf16 else "float32", dropout=0.2 if case == "dropout" else 0.0)
    torch.manual_seed(1 + rank)  # as raycv.fold has it: dropout differs between workers
    config = train_config(batch_size=4, **CASES[case])
    loop = FoldTrainer(model, toy.encoded, config, "bf16" if bf16 else "fp32", Recorder())
    result = loop.fit(TRAIN, VAL)
    return {
        "layout": sorted(loop.layout.items()),
        "losses": [(epoch.train_loss, epoch.val_loss) for epoch in result.epochs],
        "metrics": [epoch.metrics for epoch in result.epochs],
        "scores": result.val_scores.tolist(),
        "weights": [float(p.detach().double().abs().sum()) for p in model.parameters() if p.requires_grad],
    }


def pack_where_one_worker_must_not(folder: Path, rank: int) -> dict[str, Any]:
    toy, recorder = Toy(toy_base(folder / "one must not")), Recorder()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(RowScorer, "check_packing", lambda scorer: "it seems so here")
        loop = FoldTrainer(toy.model(), toy.encoded, train_config(packing=True), "fp32", recorder)
    return {"layout": sorted(loop.layout.items()), "events": recorder.events}


def work(rank: int, folder: Path) -> None:
    """All that one of two workers does; its results go to a file."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    made = {}
    for case in CASES:
        made[case] = train(folder / str(rank), case, rank)
        AcceleratorState._reset_state(reset_partial_state=True)  # as conftest.py does between tests
    made["one must not"] = pack_where_one_worker_must_not(folder / str(rank), rank)
    (folder / f"{rank}.json").write_text(json.dumps(made))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two made."""
    folder = tmp_path_factory.mktemp("two")
    code = "import sys; from test_parallel import Path, work; work(int(sys.argv[1]), Path(sys.argv[2]))"
    # A thread each: more would wait for each other where cores are few.
    here, alone = Path(__file__).parent, os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(folder)], cwd=here, env=alone) for rank in range(2)
    ]
    assert [worker.wait(timeout=400) for worker in workers] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "close"), [("shuffled", 1e-5), ("post_grouped", 1e-5), ("bf16", 0.02), ("dropout", 0.2)]
)
def test_two_workers_train_what_one_trains(tmp_path: Path, two: list[dict[str, Any]], case: str, close: float) -> None:
    """To rounding; with dropout, whose draws are others, to its noise. Both end with the same weights, bit for bit."""
    alone = json.loads(json.dumps(train(tmp_path, case)))
    first, second = (made[case] for made in two)
    layout = "shared" if "batching" in CASES[case] else "packed"
    assert first == second
    assert first["layout"] == alone["layout"] == [[False, "shared"], [True, layout]]
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=close)
    np.testing.assert_allclose(first["scores"], alone["scores"], atol=close)
    np.testing.assert_allclose(first["weights"], alone["weights"], rtol=10 * close)
    if close < 0.01:
        assert first["metrics"] == alone["metrics"]
    assert not torch.distributed.is_initialized()


@pytest.mark.core
@pytest.mark.slow
def test_no_worker_packs_where_one_must_not(two: list[dict[str, Any]]) -> None:
    """Each looks for itself, and in bf16 the look is rough: rows divided in two ways would be lost and doubled."""
    assert [made["one must not"]["layout"] for made in two] == [[[False, "padded"], [True, "padded"]]] * 2
    (first,), (second,) = (made["one must not"]["events"] for made in two)
    assert first == "every prompt is computed on its own: another worker of the fold found that it must be"
    assert second == "every prompt is computed on its own: it seems so here"


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_fold_of_two_workers_under_ray(tmp_path):
    small = ["experiment=quickstart", "cv.folds=2", "train.epochs=1", "dora.lora_dropout=0"]
    for workers in (1, 2):
        # Each of two cores has a worker, either way.
        more = [f"resources.workers_per_fold={workers}", f"run.name=w{workers}", f"cv.max_concurrent={3 - workers}"]
        result = raycv("run", *small, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = (json.loads((tmp_path / f"runs/w{workers}/report.json").read_text()) for workers in (1, 2))
    for a, b in zip(one["folds"], two["folds"], strict=True):
        assert (a["worker"]["workers"], b["worker"]["workers"]) == (1, 2)
        assert a["history"][0]["train_loss"] == pytest.approx(b["history"][0]["train_loss"], rel=1e-3)
        assert a["metrics"] == pytest.approx(b["metrics"], abs=0.02)
