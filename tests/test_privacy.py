"""No text and no password leaves its place: canaries are planted, real processes run, and every file is searched."""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import psutil
import pytest
from support.builders import base_without_numbers
from support.commands import ROOT, background, raycv, wait_until
from support.mlflow_runs import server  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]

POST_CANARY, CRITERION_CANARY, ASKED_CANARY = "zebra quilt 4471", "violet anvil 9032", "copper lantern 5518"
"""In every post, in every criterion of the data, and in what is typed on a command line."""
CANARIES = (POST_CANARY, CRITERION_CANARY, ASKED_CANARY)
PASSWORD = "s3cret-heron"
CREDENTIALS = f"ann:{PASSWORD}"
# Ids from data that would climb out of any folder that they name a file in.
NASTY_IDS = ("../../escaped", "/tmp/raycv-escaped", "..", "a/b", "C:\\x", "~root", "${HOME}", "*", "-rf")
TINY = ("experiment=quickstart", "cv.folds=2", "train.epochs=1")


@dataclass
class Place:
    """A user's working directory, home and Ray folder, and all that was printed there."""

    root: Path
    ray: Path
    printed: list[str] = field(default_factory=list)
    found_amid: list[str] = field(default_factory=list)
    """what `leaks` found while a killed run lay there"""

    def raycv(self, command: str, *overrides: str, exit_code: int = 0, **environment: str) -> str:
        """Runs the command here; returns what it printed."""
        done = raycv(command, *overrides, cwd=self.work, **self.own, **environment)
        self.printed.append(done.stdout + done.stderr)
        assert done.returncode == exit_code, self.printed[-1]
        return done.stdout

    @contextlib.contextmanager
    def background(self, command: str, *overrides: str, until: Callable[[str], object]) -> Iterator[subprocess.Popen]:
        """Starts the command here; yields its process when `until` holds of what that has printed."""
        log = self.root / "background"
        with background(self.work, *overrides, command=command, out=log, **self.own) as process:
            wait_until(lambda: until(log.read_text()), process, log)
            yield process
        self.printed.append(log.read_text())

    @property
    def own(self) -> dict[str, str]:
        return {"RAY_TMPDIR": str(self.ray), "HOME": str(self.home)}

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def home(self) -> Path:
        return self.root / "home"

    def leaks(self, *secrets: str) -> list[str]:
        """Where any of `secrets` is found: files here and in Ray's folder, byte by byte, their names, the output.

        Parquet, which is compressed, is read.
        """
        needles = [secret.encode(coding) for secret in secrets for coding in ("utf-8", "utf-16-le")]
        found = [f"printed: {text}" for text in self.printed if any(secret in text for secret in secrets)]
        searched = 0
        for path in (*self.work.rglob("*"), *self.home.rglob("*"), *self.ray.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            searched += 1
            content = path.read_bytes() + str(path).encode()
            if path.suffix == ".parquet":
                content += pd.read_parquet(path).to_csv().encode()
            found += [str(path)] * any(needle in content for needle in needles)
        assert searched > 20, "the search itself went wrong"
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield from new_place(tmp_path)


def new_place(root: Path) -> Iterator[Place]:
    # Ray's sockets lie in its folder, and the path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="rc") as ray:
        made = Place(root, Path(ray))
        made.work.mkdir()
        made.home.mkdir()
        yield made


def planted_data(folder: Path, posts: int = 30) -> Path:
    """Some of the sample under ids that climb, a canary at both ends of every text: a part of it is found too."""
    folder.mkdir()
    sample = ROOT / "data" / "sample"
    texts = pd.read_csv(sample / "posts.csv", dtype=str).head(posts)
    ids = {old: f"{NASTY_IDS[n % len(NASTY_IDS)]}{n}" for n, old in enumerate(texts["post_id"])}
    texts["post"] = [f"{POST_CANARY}, {text} {POST_CANARY}" for text in texts["post"]]
    labels = pd.read_csv(sample / "groundtruth.csv", dtype=str)
    labels = labels[labels["post_id"].isin(ids)]
    for frame in (texts, labels):
        frame["post_id"] = frame["post_id"].map(ids)
    criteria = pd.read_csv(sample / "criteria.csv", dtype=str)
    criteria["criterion"] = [f"{CRITERION_CANARY}, {text} ({CRITERION_CANARY})" for text in criteria["criterion"]]
    for name, frame in (("posts", texts), ("groundtruth", labels), ("criteria", criteria)):
        frame.to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """All that handles text was done here: runs that end well and badly, refusals, answers, files of answers."""
    root = tmp_path_factory.mktemp("used")
    for place in new_place(root):
        # Outside the working directory: the texts' own place is not searched.
        data = planted_data(root / "data")
        own = (f"data.dir={data}", f"data.criteria_dir={data}")
        broken = base_without_numbers(root / "broken")
        place.raycv("run", *TINY, *own, "run.name=bad", f"model.name={broken}", exit_code=1)
        damaged = shutil.copytree(data, root / "damaged")
        with (damaged / "groundtruth.csv").open("a") as table:
            table.write(f'"{POST_CANARY}",A.1,no\nx,"{CRITERION_CANARY}",no\nx,A.1,"{POST_CANARY}"\n')
        place.raycv("run", *TINY, f"data.dir={damaged}", f"data.criteria_dir={data}", exit_code=2)

        # Killed once, and the run that all answers are of.
        state = place.work / "runs/good/fold_1/state"
        killed = ("experiment=quickstart", "cv.folds=2", "train.epochs=2", "train.checkpoint_minutes=0.001", *own)
        killed += ("run.name=good", "cv.max_concurrent=1")
        with place.background("run", *killed, until=lambda _, state=state: list(state.glob("0*"))) as process:
            family = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
        psutil.wait_procs(family, timeout=60)
        # What goes when the run is complete is searched before: training states, Ray's own storage.
        assert list(state.glob("0*/tensors.safetensors"))
        assert (place.work / "runs/good/ray").is_dir()
        place.found_amid = place.leaks(*CANARIES)
        place.raycv("run", "resume=good")

        post = f"post={ASKED_CANARY}, I cannot sleep, {ASKED_CANARY}"
        criterion = f"criterion={ASKED_CANARY}, is worn out, {ASKED_CANARY}"
        place.raycv("infer", post, criterion, "run=good")
        place.raycv("infer", post, "output=json", "run=good", "fold=ensemble")
        for mistyped in (f"posts={ASKED_CANARY}, {{", f"--post={ASKED_CANARY}", f"post:{ASKED_CANARY}"):
            place.raycv("infer", mistyped, "run=good", exit_code=2)
        place.raycv("infer", post, "run=nothing", exit_code=2)
        many = root / "pairs.csv"
        rows = [
            ("../../p", f"Tired, {POST_CANARY}", "A.4"),
            ("/tmp/raycv-escaped", "", "A.4"),
            ("q", POST_CANARY, "B.7"),
        ]
        pd.DataFrame(rows, columns=["post_id", "post", "criterion"]).to_csv(many, index=False)
        place.raycv("infer", f"input={many}", "output=scores.csv", "run=good")
        own_words = root / "posts.csv"
        pd.DataFrame({"post": [f"Tired, {POST_CANARY}"]}).to_csv(own_words, index=False)
        place.raycv("infer", f"input={own_words}", criterion, "output=s.parquet", "engine=ray", "run=good")
        with place.background(
            "serve", "run=good", "serve.port=0", until=lambda said: "listening on " in said
        ) as scorer:
            (url,) = re.findall(r"listening on (\S+)", (root / "background").read_text())
            place.raycv("infer", post, criterion, "run=good", f"server={url}")
            place.raycv("infer", post, "criterion=Z.99", "run=good", f"server={url}", exit_code=2)
            scorer.send_signal(signal.SIGINT)
            assert scorer.wait(timeout=120) == 0
        yield place


def test_no_text_is_in_what_a_killed_run_leaves(used: Place) -> None:
    assert used.found_amid == []


@pytest.mark.core
def test_no_text_is_in_any_file_or_output(used: Place) -> None:
    assert used.leaks(*CANARIES) == []


@pytest.mark.core
def test_nothing_was_written_outside_the_folders_of_the_run(used: Place) -> None:
    """The ids of posts climb, are absolute, or mean something to a shell."""
    assert sorted(path.name for path in used.work.iterdir()) == [
        "mlflow.db", "mlflow.db.lock", "mlruns", "runs", "s.parquet", "scores.csv", "scores.csv.errors.csv"
    ]  # fmt: skip
    assert sorted(path.name for path in (used.work / "runs").iterdir()) == [".last_answer.json", "bad", "good"]
    assert not list(used.root.rglob("*escaped*"))
    assert not Path("/tmp/raycv-escaped").exists()
    ids = set(pd.read_csv(used.work / "runs/good/fold_0/predictions.csv")["post_id"])
    assert any(post_id.startswith("../../escaped") for post_id in ids)


@pytest.mark.core
def test_scores_are_the_users_alone_wherever_they_lie(used: Place) -> None:
    names = {"predictions.csv", "epoch_scores.npy", "pairs.csv", "near_duplicates.csv"}
    names |= {"scores.csv", "s.parquet", "scores.csv.errors.csv"}
    found = [path for path in used.work.rglob("*") if path.name in names]
    # Two folds, in the run folder and in MLflow's.
    for name, times in (("predictions.csv", 4), ("epoch_scores.npy", 4), ("pairs.csv", 2), ("near_duplicates.csv", 2)):
        assert [path.name for path in found].count(name) == times
    assert {path.name for path in found} == names
    assert {oct(path.stat().st_mode & 0o777) for path in found} == {"0o600"}


@pytest.mark.core
def test_text_is_written_where_it_was_asked_for_and_nowhere_else(place: Place) -> None:
    """Also the check of the check: what is there is found."""
    data = planted_data(place.root / "data")
    own = (f"data.dir={data}", f"data.criteria_dir={data}", "run.name=told", "privacy.log_text=true")
    printed = place.raycv("run", *TINY, *own)
    assert "Warning: privacy.log_text=true: predictions.csv holds posts and criteria" in printed
    holders = tuple(place.work.rglob("predictions.csv"))
    assert len(holders) == 4
    assert set(place.leaks(POST_CANARY)) == set(place.leaks(CRITERION_CANARY)) == {str(path) for path in holders}
    assert {oct(path.stat().st_mode & 0o777) for path in holders} == {"0o600"}
    compressed = place.work / "compressed.parquet"
    pd.DataFrame({"post": [f"a post, {POST_CANARY}"]}).to_parquet(compressed, compression="gzip")
    assert str(compressed) in place.leaks(POST_CANARY)
    told = pd.read_csv(place.work / "runs/told/fold_0/predictions.csv")
    texts = pd.read_csv(data / "posts.csv").set_index("post_id")["post"]
    assert list(told["post"]) == [texts[post_id] for post_id in told["post_id"]]


# --- Passwords -------------------------------------------------------------------------------------------------------


@dataclass
class Guard:
    """A reverse proxy before an MLflow server that lets nobody in without the credentials."""

    url: str
    statuses: list[int] = field(default_factory=list)


@pytest.fixture
def guarded(server) -> Iterator[Guard]:
    host, port = server[0].removeprefix("http://").split(":")
    expected = "Basic " + base64.b64encode(CREDENTIALS.encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != expected:
                status, kind, content = 401, "text/plain", b"who are you?"
            else:
                upstream = http.client.HTTPConnection(host, int(port), timeout=60)
                kept = {key: value for key, value in self.headers.items() if key not in ("Authorization", "Host")}
                with contextlib.closing(upstream):
                    upstream.request(self.command, self.path, body, kept)
                    answer = upstream.getresponse()
                    status, kind, content = answer.status, answer.getheader("Content-Type", ""), answer.read()
            guard.statuses.append(status)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    guard = Guard(f"127.0.0.1:{proxy.server_port}")
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield guard
    proxy.shutdown()
    proxy.server_close()


def test_the_password_of_a_tracking_server_opens_it_and_is_written_nowhere(place: Place, guarded: Guard) -> None:
    uri = f"http://{CREDENTIALS}@{guarded.url}"
    place.raycv("run", *TINY, "run.name=good", f"tracking.uri={uri}")
    assert guarded.statuses
    assert 401 not in guarded.statuses
    place.raycv("infer", "post=I cannot sleep.", "criterion=A.4", f"tracking.uri={uri}")
    assert 401 not in guarded.statuses
    # From the environment, and the run fails: Ray's own state is then kept.
    broken = base_without_numbers(place.root / "broken")
    bad = ("run.name=bad", f"model.name={broken}")
    place.raycv("run", *TINY, *bad, exit_code=1, MLFLOW_TRACKING_URI=uri)
    assert (place.work / "runs/bad/ray").is_dir()
    # What was written is masked, which later commands say instead of trying it.
    place.raycv("infer", "post=I cannot sleep.", "criterion=A.4", "run=good")
    assert "whose password was not written down" in place.printed[-1]
    # A wrong password, and a server that is not there.
    place.raycv("run", *TINY, f"tracking.uri=http://ann:{PASSWORD}2@{guarded.url}", exit_code=2)
    assert 401 in guarded.statuses
    place.raycv("run", *TINY, f"tracking.uri=http://{CREDENTIALS}@127.0.0.1:9", exit_code=2)
    place.raycv("run", *TINY, f"tracking.uri=http://127.0.0.1:9/?access_token={PASSWORD}", exit_code=2)
    place.raycv("run", "cv.folds=[", f"tracking.uri={uri}", exit_code=2)
    encoded = base64.b64encode(CREDENTIALS.encode()).decode()
    assert place.leaks(PASSWORD, encoded) == []
    # The server's side: parameters and artifacts.
    server_files = [path for path in place.root.rglob("*") if path.is_file() and path.name != "server.log"]
    assert any(path.name == "server.db" for path in server_files)
    assert [path for path in server_files if PASSWORD.encode() in path.read_bytes()] == []
    assert json.loads((place.work / "runs/good/tracking.json").read_text())["uri"] == f"http://***@{guarded.url}"


def test_the_password_of_a_proxy_is_written_nowhere(place: Place) -> None:
    proxy = f"http://{CREDENTIALS}@127.0.0.1:9"
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": proxy, "http_proxy": proxy}
    place.raycv("run", *TINY, "model.name=some/model", exit_code=2, **away)
    assert "attempt 2 of 3" in place.printed[-1]
    place.raycv("run", *TINY, "tracking.uri=http://tracking.invalid", exit_code=2, HTTP_PROXY=proxy, http_proxy=proxy)
    assert not [text for text in place.printed if PASSWORD in text]
    assert not [path for path in place.work.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
