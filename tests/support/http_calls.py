"""Requests to the HTTP API within this process."""

import asyncio
import json

from raycv.config.schema import ServerConfig
from raycv.serving.http_api import build_api

ANSWER = {"label": "matched", "score": 0.5, "threshold": 0.5, "criterion_id": None, "model": {}, "truncated": False}


LIMITS = {"host": "127.0.0.1", "port": 0, "token": None, "replicas": 1, "max_replicas": 1}
LIMITS |= {"cpus_per_replica": "auto", "gpus_per_replica": "auto", "max_queued": 4, "batch_wait_ms": 2.0}
LIMITS |= {"max_pairs": 8, "max_post_characters": 1000, "max_body_bytes": 20000}


class Echo:
    """Answers every question alike, or raises `error`."""

    def __init__(self, error=None):
        self.error, self.asked = error, []

    async def score(self, questions, log, alone):
        if self.error is not None:
            raise self.error
        self.asked.append((list(questions), log, alone))
        return {"answers": [[ANSWER] for _ in questions], "criteria": {}, "model": {}, "warnings": []}

    def health(self):
        return {"status": "ok"}


JSON = (b"content-type", b"application/json")


def call(app, method, path, body=b"", headers=(), chunk=4096, run=asyncio.run):
    """Status and JSON of one request, its body in pieces and without a length unless `headers` has one."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [data[start : start + chunk] for start in range(0, len(data), chunk)] or [b""]
    sent = []

    async def receive():
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    given = [*headers] if any(name == b"content-type" for name, _ in headers) else [*headers, JSON]
    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode()}
    scope |= {"query_string": b"", "headers": given, "scheme": "http", "root_path": "", "asgi": {"version": "3.0"}}
    run(app(scope, receive, send))
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(text) if text[:1] == b"{" else text.decode(errors="replace")


def api(error=None, **limits):
    scorer = Echo(error)
    return build_api(scorer, ServerConfig(**LIMITS | limits)), scorer
