"""A base model on the local hub server, and a pickle that would run code."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub_server import HubServer

NAME = "org/model"


# Enough for a client that only fetches: nothing is loaded from it. The cache keeps equal contents once, so all differ.
REPO = {
    "config.json": b'{"of": "model"}',
    "tokenizer.json": b'{"of": "tokenizer"}',
    "tokenizer_config.json": b'{"of": "tokenizer config"}',
    "tokenizer.model": b"sentencepiece",
    "model.safetensors": bytes(range(256)) * 16,
    "pytorch_model.bin": b"the same weights again",
    "tf_model.h5": b"and again",
    "README.md": b"# a model",
    "modeling_own.py": b"raise SystemExit",
    "onnx/model.onnx": b"and again",
    "original/params.json": b"{}",
}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[HubServer]:
    """A hub of its own, which the real client in this process is pointed at, with an empty cache."""
    from huggingface_hub import constants, file_download

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # tests as a whole run offline
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))
