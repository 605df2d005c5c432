"""An S3-compatible server (moto's) in the test process, which can be away for a while and keeps its objects."""

import logging
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "raycv-tests"
RUNS = f"s3://{BUCKET}/some/runs"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


class ObjectStorage:
    """The server, its bucket, and the variables of the environment with which a command finds both."""

    def __init__(self, cache: Path) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]
        self.environment = {
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RAYCV_CACHE": str(cache),
        }
        self.client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        # All servers of this process share what they hold.
        urlopen(Request(f"{self.environment['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()
        self.client.create_bucket(Bucket=BUCKET)

    def stop(self) -> None:
        """The server answers no more; what it holds stays."""
        self._server.stop()

    def come_back(self) -> None:
        """The server answers at the same address again."""
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()

    def names(self, prefix: str = "") -> list[str]:
        """The names of the objects below the folder of runs."""
        folder = RUNS.removeprefix(f"s3://{BUCKET}/")
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{folder}/{prefix}")
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [name.removeprefix(f"{folder}/") for name in found if not name.endswith("/")]

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=self._key(name))["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=self._key(name), Body=content)

    def delete(self, name: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=self._key(name))

    def _key(self, name: str) -> str:
        return f"{RUNS.removeprefix(f's3://{BUCKET}/')}/{name}"


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStorage]:
    """A server with an empty bucket, which this process and the commands that it starts use."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    there = ObjectStorage(tmp_path / "cache")
    for name, value in there.environment.items():
        monkeypatch.setenv(name, value)
    yield there
    there.stop()
