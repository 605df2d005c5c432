"""The whole path once, for real: five Tune trials, a TorchTrainer each, SQLite MLflow; then many looks at what it left.

Every number is computed again from `predictions.csv`, independently of the code that made it.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from support.commands import ROOT, raycv
from support.pages import python_blocks, undocumented
from support.refusals import said_refusal

from raycv.config.schema import RunConfig
from raycv.config.validation import fields

METRICS = ("precision", "recall", "f1", "accuracy", "roc_auc")
FOLDS = 5
PAGE = {"evaluation.json", "report.html", "report.md", "model_card.md", "tables", "figures"}

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


COUNTS_TOKENIZED = """
import importlib.util, os, sys

class Counting:
    '''Makes each process of a run that imports raycv.data.prompt_encoder write down how many prompts it encodes.'''

    def find_spec(self, name, path=None, target=None):
        if name != "raycv.data.prompt_encoder":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            real = module.PromptEncoder.tokens

            def tokens(encoder, prompts):
                with open(os.environ["TOKENIZED"], "a") as file:
                    file.write(f"{os.getpid()} {len(prompts)}\\n")
                return real(encoder, prompts)

            module.PromptEncoder.tokens = tokens

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Counting())
"""


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """A file with a line for each time that a process of the run turned prompts to tokens: its id and their number."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(COUNTS_TOKENIZED)
    return folder / "tokenized"


@pytest.fixture(scope="module")
def done(tmp_path_factory, tokenized):
    """One quickstart run as a user would start it, in an empty folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    path = os.pathsep.join([str(tokenized.parent), os.environ.get("PYTHONPATH", "")])
    watched = {"PYTHONPATH": path, "TOKENIZED": str(tokenized)}
    result = raycv("run", "experiment=quickstart", "cv.folds=5", "run.name=first", cwd=folder, **watched)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


def test_prompts_become_tokens_once_for_all_folds(done, tokenized):
    """In the driver: the workers of five folds share what it made."""
    processes, prompts = zip(*(line.split() for line in tokenized.read_text().splitlines()), strict=True)
    assert len(set(processes)) == 1
    assert sum(map(int, prompts)) == len(sample())


@pytest.fixture(scope="module")
def run(done):
    return done[0] / "runs" / "first"


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def predictions(run):
    return [pd.read_csv(run / f"fold_{k}" / "predictions.csv", dtype={"post_id": str}) for k in range(FOLDS)]


@pytest.fixture(scope="module")
def mlflow_runs(done):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{done[0] / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("raycv")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parent = next(run for run in runs if run.data.tags.get("raycv.run") == "first")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return client, parent, sorted(children, key=lambda run: int(run.data.tags["raycv.fold"]))


def sample():
    frame = pd.read_csv(ROOT / "data/sample/groundtruth.csv", dtype={"post_id": str})
    frame["label"] = frame["label"].map({"yes": 1, "no": 0}).fillna(frame["label"]).astype(int)
    return frame.sort_values(["post_id", "criterion_id"], ignore_index=True)


def test_the_tree_is_complete(run):
    expected = {"config.yaml", "splits.json", "data_stats.json", "environment.json", "tracking.json", "report.json"}
    expected |= {"pairs.csv", "near_duplicates.csv", *PAGE}
    assert expected | {f"fold_{k}" for k in range(FOLDS)} == {path.name for path in run.iterdir()}
    for k in range(FOLDS):
        names = {path.name for path in (run / f"fold_{k}").iterdir()}
        assert names == {"result.json", "predictions.csv", "epoch_scores.npy", "checkpoint"}
        names = {path.name for path in (run / f"fold_{k}" / "checkpoint").iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "raycv.json", "tokenizer.json"} <= names


def test_the_docs_name_each_file_of_the_run_folder_and_each_name_in_mlflow(done, run, mlflow_runs):
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    in_checkpoints = {name for name in files if "/checkpoint/" in name}
    assert undocumented(files - in_checkpoints, "reference/run-folder.md") == set()
    assert undocumented({name.rpartition("/")[2] for name in in_checkpoints}, "reference/run-folder.md") == set()
    client, parent, children = mlflow_runs
    config = {key for key, _ in fields(RunConfig)}
    for one in (parent, *children):
        names = {*one.data.metrics, *one.data.tags, *one.data.params} - config - {"mlflow.user", "mlflow.runName"}
        artifacts = {file.path + "/" * file.is_dir for file in client.list_artifacts(one.info.run_id)}
        assert undocumented(names | artifacts, "reference/mlflow.md") == set()
    assert undocumented({"raycv.unheard_of"}, "reference/mlflow.md") == {"raycv.unheard_of"}


def test_folds_are_those_of_scikit_learn_alone(run, predictions):
    frame = sample()
    splitter = StratifiedGroupKFold(n_splits=FOLDS, shuffle=True, random_state=42)
    saved = json.loads((run / "splits.json").read_text())
    assert saved["rows"] == frame[["post_id", "criterion_id"]].values.tolist()
    for k, (train, val) in enumerate(splitter.split(frame, frame["label"], frame["post_id"])):
        assert saved["folds"][k]["val_indices"] == sorted(val.tolist())
        assert saved["folds"][k]["train_indices"] == sorted(train.tolist())
        expected = frame.loc[sorted(val), ["post_id", "criterion_id", "label"]].reset_index(drop=True)
        pd.testing.assert_frame_equal(predictions[k][["post_id", "criterion_id", "label"]], expected)


def test_every_number_follows_from_the_predictions(report, predictions):
    for k, frame in enumerate(predictions):
        fold = report["folds"][k]
        assert fold["fold"] == k
        y, score = frame["label"].to_numpy(), frame["score"].to_numpy()
        matched = (score >= fold["threshold"]).astype(int)
        expected = {
            "precision": precision_score(y, matched),
            "recall": recall_score(y, matched),
            "f1": f1_score(y, matched),
            "accuracy": accuracy_score(y, matched),
            "roc_auc": roc_auc_score(y, score),
        }
        assert fold["metrics"] == pytest.approx(expected, abs=1e-12)
        swept = [f1_score(y, (score >= i / 100).astype(int), zero_division=0) for i in range(101)]
        assert fold["metrics"]["f1"] == pytest.approx(max(swept), abs=1e-12)
    for key in METRICS:
        values = [fold["metrics"][key] for fold in report["folds"]]
        assert report["mean"][key] == pytest.approx(np.mean(values))
        assert report["std"][key] == pytest.approx(np.std(values, ddof=1))
    assert "ddof=1" in report["std_kind"]
    assert report["best_fold"] == int(np.argmax([fold["metrics"]["f1"] for fold in report["folds"]]))


def test_the_scores_of_every_epoch_and_the_facts_about_pairs_are_recorded(run, report, predictions):
    pairs = pd.read_csv(run / "pairs.csv", dtype={"post_id": str, "criterion_id": str})
    for k, frame in enumerate(predictions):
        scores, fold = np.load(run / f"fold_{k}" / "epoch_scores.npy"), report["folds"][k]
        assert (scores.dtype, scores.shape) == (np.float64, (fold["epochs"], len(frame)))
        np.testing.assert_array_equal(scores[fold["best_epoch"] - 1], frame["score"])
        for epoch, each in zip(fold["history"], scores, strict=True):
            assert roc_auc_score(frame["label"], each) == pytest.approx(epoch["roc_auc"])
        mine = pairs[pairs["fold"] == k].reset_index(drop=True)
        same = ["post_id", "criterion_id", "label"]
        pd.testing.assert_frame_equal(mine[same], frame[same])
    assert list(pairs.columns[-4:]) == ["shortened", "hard_negative", "prior", "tfidf"]
    stats = json.loads((run / "data_stats.json").read_text())["encoding"]
    assert pairs.groupby("post_id")["shortened"].max().sum() == stats["posts_shortened"]
    assert pairs["hard_negative"].isna().all()
    assert roc_auc_score(pairs["label"], pairs["tfidf"]) > roc_auc_score(pairs["label"], pairs["prior"]) > 0.5


def test_learning_is_visible(report):
    floor = report["floors"]["all_matched_f1"]
    assert report["mean"]["roc_auc"] >= 0.80
    assert report["mean"]["f1"] >= max(0.50, 2 * floor)
    assert min(fold["metrics"]["roc_auc"] for fold in report["folds"]) >= 0.65
    # No fold of a model that learns is marked as useless.
    assert (report["collapsed_folds"], [fold["collapsed"] for fold in report["folds"]]) == ([], [[]] * FOLDS)


def test_a_checkpoint_reproduces_its_scores_in_stock_peft(run, predictions):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = run / "fold_1" / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(
        ROOT / "models/tiny_llama", num_labels=2, pad_token_id=tokenizer.pad_token_id
    )
    before = {name: value.clone() for name, value in base.state_dict().items() if "score" not in name}
    model = PeftModel.from_pretrained(base, folder).eval()
    state = model.state_dict()
    assert all(value.abs().sum() > 0 for name, value in state.items() if "lora_B" in name)
    moved = [
        not torch.allclose(
            value, before[name.split("base_model.model.", 1)[1].split(".lora_")[0] + ".weight"].norm(dim=1)
        )
        for name, value in state.items()
        if "lora_magnitude_vector" in name
    ]
    assert moved
    assert all(moved)
    posts = pd.read_csv(ROOT / "data/sample/posts.csv", dtype=str).set_index("post_id")["post"]
    criteria = pd.read_csv(ROOT / "data/sample/criteria.csv", dtype=str).set_index("criterion_id")["criterion"]
    frame = predictions[1].head(90)
    prompts = [
        f"post: {posts[p]}, criterion: {criteria[c]} Does the post match the criterion description? Output yes or no"
        for p, c in zip(frame["post_id"], frame["criterion_id"], strict=True)
    ]
    batch = tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        scores = torch.softmax(model(**batch).logits.double(), -1)[:, 1].numpy()
    np.testing.assert_allclose(scores, frame["score"], atol=1e-5)


def test_the_docs_way_to_open_a_checkpoint_works_as_written(run):
    (code,) = python_blocks("reference/run-folder.md")
    code = code.replace("runs/<name>", str(run))
    # Its relative path of the quickstart's base is meant from the checkout.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[01]\.\d{3} (un)?matched\n", done.stdout)


@pytest.fixture(scope="module")
def posts():
    return pd.read_csv(ROOT / "data/sample/posts.csv", dtype={"post_id": str}).set_index("post_id")["post"]


def test_inference_finds_the_predictions_again(run, report, predictions, posts, tmp_path, monkeypatch):
    """FR-008: training and inference share prompts, long posts, criteria and thresholds, so scores are the same."""
    from raycv.infer import main

    for fold, expected in enumerate(predictions):
        source, output = tmp_path / f"fold_{fold}.csv", tmp_path / f"scores_{fold}.csv"
        asked = expected[["post_id", "criterion_id"]]
        asked.assign(post=asked["post_id"].map(posts)).to_csv(source, index=False)
        given = (f"input={source}", f"output={output}", "run=first", f"fold={fold}", f"dir={run.parent}")
        if fold == 0:
            result = raycv("infer", *given, "tracking.uri=none", cwd=tmp_path)
            assert result.returncode == 0, result.stderr
        else:  # the same without the start of a process
            monkeypatch.setattr(sys, "argv", ["raycv.infer", *given, "tracking.uri=none"])
            main()
        found = pd.read_csv(output, dtype={"post_id": str})
        pd.testing.assert_frame_equal(found[["post_id", "criterion_id"]], asked)
        np.testing.assert_allclose(found["score"], expected["score"], atol=1e-5)
        assert set(found["threshold"]) == {report["folds"][fold]["threshold"]}
        assert set(found["fold"]) == {fold}


def test_the_infer_command_answers_from_the_latest_run_and_from_mlflow(done, report, predictions, posts, mlflow_runs):
    _, parent, _ = mlflow_runs
    row = predictions[report["best_fold"]].iloc[0]
    question = (f"post={posts[row['post_id']]}", f"criterion={row['criterion_id']}", "output=json")
    for which in ("latest", parent.info.run_id):
        result = raycv("infer", *question, f"run={which}", cwd=done[0])
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer["score"] == pytest.approx(row["score"], abs=1e-5)
        assert (answer["model"]["fold"], answer["criterion_id"]) == (report["best_fold"], row["criterion_id"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", answer["model"]["finished"])
        assert answer["model"]["finished"] == report["finished"] == parent.data.tags["raycv.finished"]


def test_files_with_scores_are_the_users_alone(run):
    names = ("predictions.csv", "epoch_scores.npy", "pairs.csv", "near_duplicates.csv")
    files = [path for path in run.rglob("*") if path.name in names]
    assert len(files) == 2 * FOLDS + 2
    assert [path for path in files if path.stat().st_mode & 0o077] == []
    assert not list(run.rglob("README.md"))


def test_config_environment_and_statistics_are_recorded(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["cv"] == {"folds": 5, "seed": 42, "max_concurrent": "auto", "only": None}
    assert config["model"]["name"] == "raycv://models/tiny_llama"
    assert config["run"]["name"] == run.name
    environment = json.loads((run / "environment.json").read_text())
    manifest = json.loads((run / "fold_0" / "checkpoint" / "raycv.json").read_text())
    assert manifest["base_sums"] == environment["base_model"]["sha256"]
    assert manifest["missing"] == "empty"
    assert {"ray", "torch", "transformers", "peft", "mlflow"} <= set(environment["packages"])
    assert environment["seeds"] == {"cv": 42, "train": 42}
    assert environment["base_model"]["weight_format"] == "safetensors"
    stats = json.loads((run / "data_stats.json").read_text())
    frame = sample()
    assert sum(row["matched"] for row in stats["positives_per_fold"]) == frame["label"].sum()
    assert [row["pairs"] for row in stats["positives_per_fold"]] == [
        len(fold["val_indices"]) for fold in json.loads((run / "splits.json").read_text())["folds"]
    ]
    assert stats["encoding"]["prompts"] == len(frame)
    assert stats["warnings"] == []


def test_mlflow_has_a_parent_with_the_summary(mlflow_runs, report, run):
    client, parent, children = mlflow_runs
    assert parent.info.status == "FINISHED"
    for key in (*METRICS, "threshold"):
        assert parent.data.metrics[f"metric_mean_{key}"] == pytest.approx(report["mean"][key])
        assert parent.data.metrics[f"metric_std_{key}"] == pytest.approx(report["std"][key])
    assert parent.data.metrics["best_fold"] == report["best_fold"]
    assert parent.data.tags["best_fold"] == str(report["best_fold"])
    assert parent.data.params["cv.folds"] == "5"
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"config.yaml", "splits.json", "data_stats.json", "environment.json", "report.json"} <= artifacts
    assert {"pairs.csv", "near_duplicates.csv", *PAGE} <= artifacts
    verdict = json.loads((run / "evaluation.json").read_text())["verdict"]
    checks = {key for key in parent.data.tags if key.startswith("raycv.check.")}
    assert checks == {f"raycv.check.{code}" for code in verdict["checks"]}
    assert parent.data.tags["mlflow.note.content"].startswith(verdict["sentences"][0][:40])
    for child in children:
        fold = child.data.tags["raycv.fold"]
        assert parent.data.tags[f"mlflow.raycv.fold_{fold}.run_id"] == child.info.run_id
        assert f"/runs/{child.info.run_id}" in parent.data.tags["mlflow.note.content"]
    assert len(parent.inputs.dataset_inputs) == 1


def test_mlflow_has_the_best_fold_as_a_model(mlflow_runs, report, run):
    import mlflow

    client, parent, _ = mlflow_runs
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert (model.name, model.status, model.source_run_id) == ("model", "READY", parent.info.run_id)
    assert model.tags["raycv.fold"] == str(report["best_fold"])
    predictions = pd.read_csv(run / f"fold_{report['best_fold']}" / "predictions.csv", dtype={"post_id": str}).head()
    posts = pd.read_csv(ROOT / "data/sample/posts.csv", dtype=str).set_index("post_id")["post"]
    pairs = pd.DataFrame(
        {"post": predictions["post_id"].map(posts).to_list(), "criterion": predictions["criterion_id"].to_list()}
    )
    scores = mlflow.pyfunc.load_model(model.artifact_location).predict(pairs)["score"]
    assert scores.to_numpy() == pytest.approx(predictions["score"].to_numpy(), abs=1e-5)


def test_mlflow_has_a_child_per_fold(mlflow_runs, report):
    client, _, children = mlflow_runs
    assert [child.info.run_name for child in children] == [f"fold_{k}" for k in range(FOLDS)]
    asked_for = {"train_loss", "val_loss", *METRICS, "threshold", "learning_rate"}
    asked_for |= {f"best_{key}" for key in (*METRICS, "threshold")} | {"best_epoch", "epochs", "fold_seconds"}
    asked_for |= {"restarts", "out_of_memory"}
    for k, child in enumerate(children):
        fold = report["folds"][k]
        assert child.info.status == "FINISHED"
        assert set(child.data.metrics) == asked_for
        for key in METRICS:
            assert child.data.metrics[f"best_{key}"] == pytest.approx(fold["metrics"][key])
            history = client.get_metric_history(child.info.run_id, key)
            assert [(point.step, point.value) for point in history] == [
                (epoch["epoch"], pytest.approx(epoch[key])) for epoch in fold["history"]
            ]
        assert child.data.metrics["best_threshold"] == fold["threshold"]
        assert child.data.params["fold"] == str(k)
        assert child.data.params["dora.r"] == "8"
        artifacts = {file.path for file in client.list_artifacts(child.info.run_id)}
        assert {"config.yaml", "result.json", "predictions.csv", "epoch_scores.npy", "checkpoint"} <= artifacts
        checkpoint = {file.path for file in client.list_artifacts(child.info.run_id, "checkpoint")}
        assert "checkpoint/adapter_model.safetensors" in checkpoint


def test_what_the_user_reads(done, run):
    _, result = done
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) < 400
    for word in ("precision", "recall", "F1", "accuracy", "ROC-AUC", "threshold", "mean", "std", "best fold"):
        assert word in result.stdout, word
    assert "…" not in result.stdout
    assert f"Report:        {run / 'report.json'}" in lines
    assert f"Page:          {run / 'report.html'}" in lines
    assert re.search(r"^Honest F1: +0\.\d{3} \(", result.stdout, re.MULTILINE)
    database = re.escape(f"sqlite:///{run.parents[1] / 'mlflow.db'}")
    assert re.search(rf"^MLflow: +mlflow ui --backend-store-uri {database}$", result.stdout, re.MULTILINE)
    assert "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning" in result.stdout
    assert re.search(r"^Columns: .*metric_mean_f1.*best_fold.*best_f1", result.stdout, re.MULTILINE)
    assert "Ray dashboard while it runs: http://127.0.0.1:" in result.stdout
    assert "Matched pairs per validation fold" in result.stdout
    for k in range(FOLDS):
        assert len(re.findall(rf"fold {k}: epoch \d", result.stdout)) == 3
    for chatter in ("(raylet)", "WARNING", "INFO", "State API", "Traceback", "UserWarning"):
        assert chatter not in result.stdout + result.stderr, result.stdout + result.stderr


def test_no_post_text_left_the_data_folder(done):
    """Sentences of the posts are looked for, byte by byte, in all that the run left and printed."""
    folder, result = done
    posts = pd.read_csv(ROOT / "data/sample/posts.csv", dtype=str)["post"]
    needles = {post[10:50].encode() for post in posts if len(post) > 60}
    assert len(needles) > 20
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(needle in content for needle in needles), path
    printed = (result.stdout + result.stderr).encode()
    assert not any(needle in printed for needle in needles)


def test_the_page_is_made_again_from_the_folder_byte_for_byte(done, run):
    folder, _ = done
    before = {name: (run / name).read_bytes() for name in PAGE if (run / name).is_file()}
    result = raycv("report", "run=first", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert {name: (run / name).read_bytes() for name in before} == before


def test_aggregate_finds_the_same_summary_again(done, run, report, mlflow_runs):
    folder, _ = done
    client, parent, _ = mlflow_runs
    for how in ("first", "latest", parent.info.run_id):
        result = raycv("aggregate", f"run={how}", cwd=folder)
        assert result.returncode == 0, result.stderr
        assert json.loads((run / "report.json").read_text()) == report
        assert "mean" in result.stdout
    again = client.get_run(parent.info.run_id)
    assert again.data.metrics["metric_mean_f1"] == pytest.approx(report["mean"]["f1"])
    assert again.info.status == "FINISHED"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(done, report):
    """SC-003, exactly: on one machine nothing may differ, although the folds ran beside each other."""
    folder, _ = done
    small = ["experiment=quickstart", "train.epochs=1", "cv.folds=2"]
    results = {}
    for name, seed in (("a", 42), ("b", 42), ("c", 7)):
        result = raycv("run", *small, f"run.name={name}", f"train.seed={seed}", cwd=folder)
        assert result.returncode == 0, result.stderr
        folds = json.loads((folder / "runs" / name / "report.json").read_text())["folds"]
        results[name] = [(fold["metrics"], fold["threshold"], fold["history"][0]["train_loss"]) for fold in folds]
        scores = [pd.read_csv(folder / "runs" / name / f"fold_{k}/predictions.csv")["score"] for k in range(2)]
        results[name].append([score.tolist() for score in scores])
    assert results["a"] == results["b"]
    assert all(a != c for a, c in zip(results["a"], results["c"], strict=True))


@pytest.mark.slow
def test_with_shuffled_labels_scores_fall_to_chance(done):
    """Labels permuted over the pairs: whatever remains above chance would be a leak."""
    folder, _ = done
    result = raycv("run", "experiment=quickstart", "data.shuffle_labels=true", "run.name=control", cwd=folder)
    assert result.returncode == 0, result.stderr
    control = json.loads((folder / "runs" / "control" / "report.json").read_text())
    assert 0.40 <= control["mean"]["roc_auc"] <= 0.60
    assert control["mean"]["f1"] < 2 * control["floors"]["all_matched_f1"]
    assert "the labels are permuted" in result.stdout
    # Nobody may take it for a result, wherever it is read.
    assert control["control"] is True
    assert any("permuted" in warning for warning in control["warnings"])
    stats = json.loads((folder / "runs" / "control" / "data_stats.json").read_text())
    shuffled = pd.concat([pd.read_csv(folder / f"runs/control/fold_{k}/predictions.csv") for k in range(FOLDS)])
    assert stats["positives_per_criterion"] == shuffled.groupby("criterion_id")["label"].sum().to_dict()
    assert stats["data_hash"] != json.loads((folder / "runs" / "first" / "data_stats.json").read_text())["data_hash"]
    assert "CONTROL, labels permuted, not a result: control" in result.stdout
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("raycv").experiment_id], "tags.`raycv.run` = 'control'")
    assert runs[0].data.tags["raycv.control"] == "labels permuted"
    assert runs[0].data.tags["mlflow.note.content"].startswith("**Control")
    assert "CONTROL" in raycv("aggregate", "run=control", cwd=folder).stdout


def test_a_check_measures_where_the_folds_would_run_and_leaves_nothing(tmp_path):
    done = raycv("run", "experiment=quickstart", "check=true", "cv.only=[0,1,2]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^Measured on: +cpu .*, fp32, sdpa attention$", done.stdout, re.MULTILINE)
    assert re.search(r"^Memory: +0\.\d of \d+\.\d GB", done.stdout, re.MULTILINE)
    for batching in ("shuffled", "post_grouped"):
        assert re.search(rf"train.batching={batching}: \d+\.\d\d s a step, 25 steps an epoch", done.stdout)
    assert len(re.findall(r"3 folds of 3 epochs: about \d+ minutes?$", done.stdout, re.MULTILINE)) == 2
    assert list(tmp_path.iterdir()) == []
    both = raycv("run", "experiment=quickstart", "check=true", "resume=mine", cwd=tmp_path)
    said_refusal(both.stderr, "config-value", "check=true", "resume=mine")
