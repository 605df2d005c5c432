"""What a user sees when a run cannot begin or a fold fails: cause, remedy, exit code, and nothing averaged."""

import json
import time

import pytest
from test_run import raycv

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cv.folds=5"], ["irlab-udc/redsm5", "experiment=quickstart", "data/redsm5"]),
        (["experiment=quickstart", "cv.folds=5000"], ["cv.folds=5000", "posts"]),
        (["experiment=quickstart", "data.dir=nowhere"], ["nowhere"]),
    ],
)
def test_bad_data_is_refused_in_seconds_and_nothing_is_written(tmp_path, overrides, said):
    started = time.monotonic()
    result = raycv("run", *overrides, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert time.monotonic() - started < 10
    assert result.returncode == 2
    imported = {
        line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }
    assert "raycv.driver" in imported
    assert not imported & {"torch", "ray", "mlflow", "transformers"}
    message = "\n".join(line for line in result.stderr.splitlines() if not line.startswith("import time"))
    assert "Traceback" not in message
    for word in said:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_a_taken_name_is_refused(tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    result = raycv("run", "experiment=quickstart", "run.name=mine", cwd=tmp_path)
    assert result.returncode == 2
    assert "run.name=mine" in result.stderr
    assert "choose another run.name" in result.stderr
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.ray
def test_a_fold_that_can_never_be_placed_is_refused_at_once(tmp_path):
    result = raycv("run", "experiment=quickstart", "resources.gpus_per_fold=3", cwd=tmp_path)
    assert result.returncode == 2
    assert "3 GPUs, and no node has them" in result.stderr
    assert "resources.autoscaling=true" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_a_failed_fold_fails_the_run_with_its_own_error(tmp_path):
    """Modules that the model does not have: found when a worker has loaded it."""
    overrides = ["experiment=quickstart", "cv.folds=2", "model.target_modules=[q_proj,query]", "run.name=broken"]
    result = raycv("run", *overrides, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "no report" in result.stderr
    assert "fold 0: model.target_modules: query not found in LlamaForSequenceClassification" in result.stderr
    assert "choose among its linear modules: down_proj, gate_proj" in result.stderr
    run = tmp_path / "runs" / "broken"
    assert not (run / "report.json").exists()
    assert "Traceback" in json.loads((run / "fold_0" / "error.json").read_text())["traceback"]
    aggregated = raycv("aggregate", "run=broken", cwd=tmp_path)
    assert aggregated.returncode == 1
    assert "nothing is averaged over fewer folds" in aggregated.stderr
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("raycv").experiment_id])
    assert {run.info.status for run in runs} == {"FAILED"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [(["run=nothing"], "mlflow.db does not exist"), ([], "There is no run"), (["run=latest", "rum=3"], "rum")],
)
def test_aggregate_without_a_run(tmp_path, overrides, said):
    result = raycv("aggregate", *overrides, cwd=tmp_path)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
