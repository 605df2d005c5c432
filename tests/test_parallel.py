"""A fold trained by two workers (gloo) is the fold trained by one: same steps, same metrics, same weights."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import raycv
from toy import Recorder, Toy, toy_base, train_config

from raycv.train import FoldTrainer

# 29 pairs in steps of 8: the last step has 5, and post-grouped ones hold fewer posts than workers now and then.
TRAIN, VAL = np.arange(29), np.arange(30, 48)


def train(folder: Path, batching: str) -> dict:
    """Trains the toy fold in this process, as one of its workers if torch.distributed is up."""
    toy = Toy(toy_base(folder))
    model = toy.model()
    config = train_config(epochs=2, batching=batching, batch_size=4, share_prefix=True)
    result = FoldTrainer(model, toy.encoded, config, "fp32", Recorder()).fit(TRAIN, VAL)
    return {
        "losses": [(epoch.train_loss, epoch.val_loss) for epoch in result.epochs],
        "metrics": [epoch.metrics for epoch in result.epochs],
        "scores": result.val_scores.tolist(),
        "weights": [float(p.detach().double().abs().sum()) for p in model.parameters() if p.requires_grad],
    }


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["shuffled", "post_grouped"])
def test_two_workers_train_what_one_trains(tmp_path, batching):
    alone = train(tmp_path / "alone", batching)
    code = (
        "import json, sys; from pathlib import Path; import torch; rank = int(sys.argv[1]); folder = Path(sys.argv[2]);"
        "torch.distributed.init_process_group('gloo', f'file://{folder}/meet', rank=rank, world_size=2);"
        "from test_parallel import train; made = train(folder / str(rank), sys.argv[3]);"
        "(folder / f'{rank}.json').write_text(json.dumps(made)); torch.distributed.destroy_process_group()"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path), batching], cwd=Path(__file__).parent)
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second  # to the last bit: both go on from the same weights
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(first["scores"], alone["scores"], atol=1e-5)
    np.testing.assert_allclose(first["weights"], alone["weights"], rtol=1e-4)
    assert first["metrics"] == alone["metrics"]
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_fold_of_two_workers_under_ray(tmp_path):
    small = ["experiment=quickstart", "cv.folds=2", "train.epochs=1", "dora.lora_dropout=0"]
    for workers in (1, 2):
        more = [f"resources.workers_per_fold={workers}", f"run.name=w{workers}", "cv.max_concurrent=1"]
        result = raycv("run", *small, *more, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    one, two = (json.loads((tmp_path / f"runs/w{workers}/report.json").read_text()) for workers in (1, 2))
    for a, b in zip(one["folds"], two["folds"], strict=True):
        assert (a["worker"]["workers"], b["worker"]["workers"]) == (1, 2)
        assert a["history"][0]["train_loss"] == pytest.approx(b["history"][0]["train_loss"], rel=1e-3)
        assert a["metrics"] == pytest.approx(b["metrics"], abs=0.02)
