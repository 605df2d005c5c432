"""A model hub on 127.0.0.1 for tests: as much of the hub's protocol as its real client needs, with faults on demand.

with HubServer() as hub:
    commit = hub.add("org/model", folder)
    hub.fail("model.safetensors", status=503, times=2)
    ...  # run a client whose HF_ENDPOINT is hub.endpoint
    assert hub.count("model.safetensors", method="GET") == 3
"""

import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

# What the hub keeps in LFS: a request for it is redirected to another address.
LARGE = (".safetensors", ".bin", ".model")


@dataclass
class Request:
    """One request as the server saw it. `status` is what it answered (0: nothing)."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    status: int = 0


@dataclass
class Fault:
    """What to do to the next `times` requests of `method` (None: any) whose path contains `part`."""

    part: str
    times: int
    method: str | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    stall: bool = False


@dataclass
class Repo:
    """A repository: the files of one commit, under any of `revisions`."""

    commit: str
    files: dict[str, bytes]
    revisions: set[str]


class HubServer:
    """Serves repositories until the `with` block ends; `requests` is the log of what was asked."""

    def __init__(self, *, delay: float = 0.0) -> None:
        """`delay`: seconds that each file takes, so that clients overlap."""
        self.delay = delay
        self.repos: dict[str, list[Repo]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """The hub goes down: from now on connections are refused."""
        if not self.closing.is_set():
            self.closing.set()
            self.server.shutdown()
            self.server.server_close()

    def add(self, name: str, source: Path | Mapping[str, bytes], *, branch: str = "main") -> str:
        """Makes `source` (a folder, or name -> content) the newest commit of `name`; returns the commit."""
        if isinstance(source, Path):
            source = {str(f.relative_to(source)): f.read_bytes() for f in sorted(source.rglob("*")) if f.is_file()}
        digest = hashlib.sha1(name.encode())
        for file, content in sorted(source.items()):
            digest.update(file.encode() + hashlib.sha1(content).digest())
        commit = digest.hexdigest()
        for repo in self.repos.setdefault(name, []):
            repo.revisions.discard(branch)
        self.repos[name].append(Repo(commit, dict(source), {branch, commit}))
        return commit

    def fail(
        self, part: str, *, status: int, times: int = 10**6, method: str | None = None, code: str = "", **headers: str
    ) -> None:
        """The next `times` requests to a path that contains `part` answer `status`; `code` goes to X-Error-Code."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            given["X-Error-Code"] = code
        self.faults.append(Fault(part, times, method, status=status, headers=given))

    def cut(self, part: str, *, after: int, times: int = 1, stall: bool = False) -> None:
        """The next `times` GETs of `part` get `after` bytes, then the line is cut (`stall`: nothing more comes)."""
        self.faults.append(Fault(part, times, "GET", cut_after=after, stall=stall))

    def count(self, part: str = "", *, method: str | None = None) -> int:
        """How many requests came to paths that contain `part`."""
        return sum(part in seen.path and method in (None, seen.method) for seen in self.requests)

    def fault_for(self, seen: Request) -> Fault | None:
        """The fault due for this request, used up by asking."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.part in seen.path and fault.method in (None, seen.method):
                    fault.times -= 1
                    return fault
        return None

    def find(self, name: str, revision: str) -> Repo | None:
        """The repository at `revision`."""
        return next((repo for repo in self.repos.get(name, []) if revision in repo.revisions), None)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    # Nagle's algorithm and delayed ACKs cost 40 ms a request otherwise.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        """Quiet: the log of requests is `HubServer.requests`."""

    def _serve(self) -> None:
        if self.hub.closing.is_set():  # a connection kept alive from before the hub went down
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        seen = Request(self.command, path, self.headers["Range"], self.headers["Authorization"])
        self.seen = seen
        with self.hub.lock:
            self.hub.requests.append(seen)
        fault = self.hub.fault_for(seen)
        if fault is not None and fault.status is not None:
            self._answer(fault.status, b'{"error": "a fault on demand"}', fault.headers)
        elif path.startswith("/api/models/"):
            self._list(*path.removeprefix("/api/models/").partition("/revision/")[::2], fault)
        elif "/resolve/" in path:
            name, _, rest = path.strip("/").partition("/resolve/")
            self._resolve(name, *rest.partition("/")[::2], fault)
        elif path.startswith("/cdn/"):
            name, _, rest = path.removeprefix("/cdn/").partition("/at/")
            self._cdn(name, *rest.partition("/")[::2], fault)
        else:
            self._answer(404)

    def _list(self, name: str, revision: str, fault: Fault | None) -> None:
        repo = self._find(name, revision or "main")
        if repo is not None:
            siblings = [{"rfilename": file} for file in sorted(repo.files)]
            body = {"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings}
            self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, fault)

    def _resolve(self, name: str, revision: str, file: str, fault: Fault | None) -> None:
        repo = self._find(name, revision)
        if repo is None:
            return
        if file not in repo.files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
            return
        content = repo.files[file]
        common = {"X-Repo-Commit": repo.commit}
        if file.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            location = f"{self.hub.endpoint}/cdn/{name}/at/{repo.commit}/{file}"
            large = {"Location": location, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            # The hub names a Xet address for nearly every large file; nothing answers at this one.
            xet = {"X-Xet-Hash": sha256, "X-Xet-Refresh-Route": f"{self.hub.endpoint}/xet-token"}
            self._answer(302, b"", common | large | xet)
        else:
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            self._send(content, common | {"ETag": f'"{blob}"'}, fault)

    def _cdn(self, name: str, commit: str, file: str, fault: Fault | None) -> None:
        repo = self._find(name, commit)
        if repo is not None:
            self._send(repo.files[file], {}, fault)

    def _send(self, content: bytes, headers: Mapping[str, str], fault: Fault | None) -> None:
        if self.command == "GET":
            time.sleep(self.hub.delay)
        start = int(self.seen.range.removeprefix("bytes=").partition("-")[0]) if self.seen.range else 0
        if start and start >= len(content):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        partial = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if self.seen.range else {}
        status = 206 if self.seen.range else 200
        self._answer(status, content[start:], {**headers, **partial, "Accept-Ranges": "bytes"}, fault)

    def _find(self, name: str, revision: str) -> Repo | None:
        repo = self.hub.find(name, revision)
        if repo is None:
            known = name in self.hub.repos
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        return repo

    def _answer(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        self.seen.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.cut_after is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: fault.cut_after])
        self.wfile.flush()
        if fault.stall:
            self.hub.closing.wait(15)
        self.close_connection = True
