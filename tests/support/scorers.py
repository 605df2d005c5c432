"""A resident scorer, its checkpoint and its config."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from raycv.common.files import write_json
from raycv.config.command_line import compose
from raycv.config.schema import InferConfig
from raycv.config.validation import validate
from raycv.model.checkpoint import MANIFEST
from raycv.serving.fingerprint import fingerprint, stamps_of

ANSWER = {"label": "matched", "score": 0.5, "threshold": 0.5, "criterion_id": "A.4", "truncated": False}
ANSWER |= {"model": {"run": "some", "fold": 0, "base": "base"}}


class FakeScorer(ThreadingHTTPServer):
    """Says what a scorer would; `status` and `instance` may be changed; keeps what was asked."""

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.status, self.instance, self.asked = model, 200, "one", []
        self.unwell, self.stamps, self.more = False, {}, {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answer = {"answers": [[ANSWER]], "criteria": {"A.4": "SLEEP_ISSUES"}, "warnings": ["careful"]}

    def identity(self):
        facts = [self.model.get(key) for key in ("base", "precision", "device", "finished")]
        return {"model": self.model, "fingerprint": fingerprint(self.stamps, *facts)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status = 500 if self.server.unwell else 200
        self.reply(status, {"instance": self.server.instance, **self.server.identity()})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, self.headers.get("Authorization")))
        refused = {"error": "no such criterion", "remedies": ["choose one"], **self.server.more}
        answer = self.server.answer
        self.reply(self.server.status, answer if self.server.status == 200 else refused)

    def reply(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def checkpoint(tmp_path):
    """A manifest and nothing else: what choosing a checkpoint needs."""
    folder = tmp_path / "some" / "fold_0" / "checkpoint"
    folder.mkdir(parents=True)
    info = {**dict.fromkeys(("base_revision", "criteria_hash", "criteria_dir"), ""), "base_model": "base"}
    info |= {"precision": "fp32", "criteria_dir": str(tmp_path)}
    rules = {"long_post": "head", "max_length": 48, "head_fraction": 0.25, "stride_fraction": 0.5, "post_limit": 9}
    numbers = {"threshold": 0.5, "criteria": {}, "fold": 0, "epoch": 1, "format": 1, "run": "some"}
    write_json(folder / MANIFEST, {**info, **numbers, "rules": rules})
    return folder


@pytest.fixture
def scorer(checkpoint, tmp_path):
    model = {"run": "some", "named": "some", "fold": 0, "fold_asked": "best", "base": "base"}
    model |= {"precision": "fp32", "precision_of_auto": "fp32"}
    server = FakeScorer({**model, "checkpoints": [str(checkpoint)], "criteria_dir": None})
    server.checkpoint, server.stamps = checkpoint, stamps_of([checkpoint / MANIFEST])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def config(checkpoint, runs, **changes):
    values = compose("infer", []) | {"run": str(checkpoint), "dir": str(runs)} | changes
    return validate(InferConfig, values)
