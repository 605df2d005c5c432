"""Models and checkpoints may come from anybody: what they hold is read as data, and never run."""

import ast
import json
import pickle
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.builders import tiny_llama
from support.hub_base import Planted
from support.refusals import refuses
from support.trained_runs import make_run

from raycv.config.command_line import run_command
from raycv.config.schema import InferConfig
from raycv.infer import infer
from raycv.inference.choose import choose
from raycv.model.base_model import fetch_base
from raycv.model.loading import load_classifier, load_config, load_tokenizer

PACKAGE = Path(sys.modules["raycv.infer"].__file__ or "").parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("safety"), folds=1)


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run / "fold_0" / "checkpoint", tmp_path / "checkpoint")


def asked(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> int:
    """The exit code of `python -m raycv.infer` on `checkpoint`."""
    arguments = ["raycv.infer", "post=w3 w5", "criterion=C1", f"run={checkpoint}", "tracking.uri=none"]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        run_command("infer", InferConfig, infer)
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


def plant(path: Path, trace: Path, *, zipped: bool = False) -> None:
    """A pickle at `path` that makes the folder `trace` when it is read; it is a live one."""
    import torch

    pickle.loads(pickle.dumps(Planted(trace)))
    trace.rmdir()
    payload = {"base_model.model.score.modules_to_save.weight": Planted(trace)}
    if zipped:
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))


def own_code(folder: Path, trace: Path) -> None:
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Own: pass\n")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_adapter_is_refused_and_not_run(monkeypatch, capsys, tmp_path, checkpoint, zipped):
    (checkpoint / "adapter_model.safetensors").unlink()
    plant(checkpoint / "adapter_model.bin", tmp_path / "was_run", zipped=zipped)
    assert asked(monkeypatch, checkpoint) == 2
    assert not (tmp_path / "was_run").exists()
    told = capsys.readouterr().err
    assert "adapter_model.bin is a pickle, which could run code, and is never read" in told
    assert "What to do" in told
    assert "Traceback" not in told


def test_pickles_beside_an_adapter_are_not_read(monkeypatch, capsys, tmp_path, checkpoint):
    for name in (
        "adapter_model.bin",
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng.pkl",
    ):
        plant(checkpoint / name, tmp_path / "was_run")
    assert asked(monkeypatch, checkpoint) == 0
    assert "matched" in capsys.readouterr().out
    assert not (tmp_path / "was_run").exists()


def test_a_pickle_in_the_base_of_a_checkpoint_is_refused_and_not_run(monkeypatch, capsys, tmp_path, checkpoint):
    info = json.loads((checkpoint / "raycv.json").read_text())
    base = shutil.copytree(info["base_model"], tmp_path / "base")
    (base / "model.safetensors").unlink()
    plant(base / "pytorch_model.bin", tmp_path / "was_run")
    (checkpoint / "raycv.json").write_text(json.dumps(info | {"base_model": str(base)}))
    assert asked(monkeypatch, checkpoint) == 2
    assert "a .bin that holds more than tensors is refused" in capsys.readouterr().err
    assert not (tmp_path / "was_run").exists()


def test_code_that_comes_with_a_checkpoint_is_not_run(monkeypatch, capsys, tmp_path, checkpoint):
    own_code(checkpoint, tmp_path / "was_run")
    for name, own in (("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}), ("config.json", OWN_MODEL)):
        file = checkpoint / name
        values = json.loads(file.read_text()) if file.exists() else {"model_type": "own"}
        file.write_text(json.dumps(values | {"auto_map": own}))
    adapter = checkpoint / "adapter_config.json"
    values = json.loads(adapter.read_text())
    own = {"base_model_class": "Own", "parent_library": "own"}
    adapter.write_text(json.dumps(values | {"auto_mapping": own}))
    # Whoever adds code can also take away the checksums.
    manifest = checkpoint / "raycv.json"
    known = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({name: value for name, value in known.items() if name != "sha256"}))
    monkeypatch.syspath_prepend(checkpoint)
    assert asked(monkeypatch, checkpoint) == 0
    assert "matched" in capsys.readouterr().out
    assert not (tmp_path / "was_run").exists()


OWN_MODEL = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}


def test_code_that_a_model_of_a_known_type_brings_is_passed_over(tmp_path):
    """`auto_map` beside a model type that transformers knows: transformers' own class is taken, without a question."""
    path = tiny_llama(tmp_path / "model")
    own_code(path, tmp_path / "was_run")
    for name, own in (("config.json", OWN_MODEL), ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]})):
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": own}))
    files = fetch_base(str(path), None)
    import torch

    model = load_classifier(files, load_tokenizer(files), torch.float32, seed=0)
    assert type(model).__module__.startswith("transformers.")
    assert type(load_config(files)).__module__.startswith("transformers.")
    assert not (tmp_path / "was_run").exists()


# --- A tracking server may be anybody's ------------------------------------------------------------------------------


class Stranger(BaseHTTPRequestHandler):
    """Answers every question about a run with one whose id climbs."""

    def do_GET(self) -> None:
        info = {"run_id": "../../../escaped", "run_uuid": "x", "experiment_id": "0", "status": "FINISHED"}
        info |= {"artifact_uri": "mlflow-artifacts:/0/x/artifacts", "lifecycle_stage": "active"}
        tags = [{"key": "raycv.fold", "value": "0"}]
        content = json.dumps({"run": {"info": info, "data": {"tags": tags}}, "runs": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_the_id_of_a_run_leads_nowhere_but_into_the_folder_of_runs(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    runs = tmp_path / "a" / "b" / "runs"
    with refuses("tracking-unreachable", "../../../escaped"):
        choose("0" * 32, "best", runs, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    assert list(tmp_path.iterdir()) == []


# --- No way round ----------------------------------------------------------------------------------------------------


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_no_module_trusts_a_models_code_or_unpickles_a_file(module):
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    trusts = [word.value for call in calls(tree) for word in call.keywords if word.arg == "trust_remote_code"]
    assert all(isinstance(value, ast.Constant) and value.value is False for value in trusts)
    # NumPy unpickles nothing where it is told so.
    safe = {id(call) for call in calls(tree) if "allow_pickle=False" in map(ast.unparse, call.keywords)}
    names = [ast.unparse(call.func) for call in calls(tree) if id(call) not in safe]
    assert not {"torch.load", "pickle.load", "joblib.load", "numpy.load", "np.load", "eval", "exec"} & set(names)
    # What this process and its Ray actors hand to each other.
    if module not in ("orchestration/ray_data.py", "orchestration/trainer.py"):
        assert "pickle.loads" not in names


def test_the_walk_sees_the_calls():
    found = [call for path in PACKAGE.rglob("*.py") for call in calls(ast.parse(path.read_text(encoding="utf-8")))]
    assert sum(word.arg == "trust_remote_code" for call in found for word in call.keywords) >= 3


def test_what_a_fold_leaves_holds_no_pickle(run):
    files = [path for path in (run / "fold_0" / "checkpoint").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
