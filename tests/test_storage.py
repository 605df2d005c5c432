"""Runs in an object storage, against a real S3-compatible server."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from filelock import FileLock
from moto.core import set_initial_no_auth_action_count
from support.object_storage import RUNS, ObjectStorage, storage  # noqa: F401
from support.refusals import refuses, said_refusal
from support.run_folders import noisy, write_run

from raycv import load_run
from raycv.common.locations import FETCHED, WORK, address_of, place_of, runs_folder
from raycv.compare import main as compare
from raycv.config.command_line import compose_checked
from raycv.config.schema import RunConfig
from raycv.errors import RunFailedError
from raycv.inference.choose import choose
from raycv.mistakes import main as mistakes
from raycv.rendering.terminal import lines_for_afar
from raycv.report import main as report
from raycv.resources.publisher import StatePublisher, bring_states, hand_over, make_local_copy
from raycv.results.find_run import existing_run, find_run
from raycv.results.run_folder import RunFolder, infer_command, share_nonce
from raycv.results.storage import MANIFEST, RECORDS, Bucket, PublishedRun, bring_up_to_date, resumable_copies
from raycv.run import main as run_main
from raycv.tracking.store_checks import network_warning


class Mount(NamedTuple):
    mountpoint: str
    fstype: str


def published(name: str = "first", separation: float = 3, seed: int = 0) -> RunFolder:
    """A finished run, published from the local copy where it ran. Returns that copy."""
    folder = write_run(runs_folder(RUNS, WORK), noisy(name, separation, seed))
    run = PublishedRun.of(folder)
    assert run is not None
    run.publish_all(5)
    return folder


def command(main, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["raycv", *arguments])
    main()


def contents(root: Path) -> dict[str, bytes]:
    """The visible files of a run folder."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_an_address_and_its_local_copies_name_each_other(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYCV_CACHE", str(tmp_path))
    for kind in (WORK, FETCHED):
        copies = runs_folder("s3://bucket/a/runs/", kind)
        assert copies.is_relative_to(tmp_path / kind)
        assert place_of(copies / "mine" / "report.json") == "s3://bucket/a/runs/mine/report.json"
        assert address_of(copies, kind) == "s3://bucket/a/runs"
    assert address_of(runs_folder("s3://bucket/a", WORK), FETCHED) is None
    assert runs_folder("some/runs") == Path("some/runs")
    assert place_of(tmp_path) == str(tmp_path)
    assert "dir=s3://bucket/a" in infer_command(RunFolder(runs_folder("s3://bucket/a", WORK) / "mine"))


def test_a_published_run_is_a_plain_run_folder_and_comes_back_as_it_was(storage):
    folder = published()
    manifests = {"", "fold_0/", "fold_0/checkpoint/"}
    names = storage.names("first")
    assert {f"first/{name}{MANIFEST}" for name in manifests} <= set(names)
    visible = {name.removeprefix("first/") for name in names if not name.endswith(MANIFEST)}
    assert visible == contents(folder.root).keys()
    there = find_run(runs_folder(RUNS), "first")
    assert there is not None
    scores = {name: text for name, text in contents(folder.root).items() if "checkpoint" not in name}
    assert contents(there.root) == scores, "checkpoints come when they are asked for"


def test_what_is_there_already_is_neither_sent_nor_fetched_again(storage):
    folder = published()
    before = {name: storage.read(name) for name in storage.names()}
    run = PublishedRun.of(folder)
    sent = []
    upload, download = Bucket.upload, Bucket.download
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Bucket, "upload", lambda self, name, file: sent.append(name) or upload(self, name, file))
        patched.setattr(Bucket, "download", lambda self, name, file: sent.append(name) or download(self, name, file))
        run.publish_all(5)
        existing_run(runs_folder(RUNS), "first")
        assert len(sent) == len([name for name in before if "checkpoint" not in name and MANIFEST not in name])
        sent.clear()
        existing_run(runs_folder(RUNS), "first")
        assert sent == []
        (folder.root / "report.json").write_text("{}")
        run.publish(RECORDS)
        assert sent == ["report.json"]


def test_latest_is_the_newest_finished_run_of_the_bucket(storage):
    first, second = published("first"), published("second")
    os.utime(second.config, (2**31, 2**31))
    # The time in the bucket decides, not that of local copies. It counts whole seconds.
    time.sleep(1.1)
    storage.write("first/config.yaml", first.config.read_bytes())
    assert existing_run(runs_folder(RUNS), "latest").root.name == "first"
    storage.delete(f"first/fold_3/{MANIFEST}")
    assert existing_run(runs_folder(RUNS), "latest").root.name == "second"
    storage.delete(f"second/fold_3/{MANIFEST}")
    assert existing_run(runs_folder(RUNS), "latest").root.name == "first", "none is finished"
    with refuses("run-missing", RUNS, "first", "latest"):
        existing_run(runs_folder(RUNS), "third")


def test_a_bucket_without_runs_is_told_so(storage):
    with refuses("run-missing", RUNS, "experiment=quickstart"):
        existing_run(runs_folder(RUNS), "latest")


def test_a_part_without_its_manifest_does_not_exist(storage):
    published()
    storage.delete(f"first/fold_2/{MANIFEST}")
    folder = existing_run(runs_folder(RUNS), "first")
    assert folder.finished(5) == [0, 1, 3, 4]
    storage.delete(f"first/{MANIFEST}")
    assert find_run(runs_folder(RUNS), "first") is None


def test_a_local_copy_forgets_what_the_bucket_has_no_more(storage):
    """Another run may have the name of one that was removed."""
    published()
    folder = existing_run(runs_folder(RUNS), "first")
    (folder.root / "stale.json").write_text("{}")
    storage.delete(f"first/fold_2/{MANIFEST}")
    existing_run(runs_folder(RUNS), "first")
    assert not folder.fold(2).root.exists()
    assert not (folder.root / "stale.json").exists()


def test_an_object_without_its_checksum_is_refused(storage):
    published()
    storage.write("first/fold_1/predictions.csv", b"post_id,criterion_id,label,score\n")
    with refuses("run-damaged", f"{RUNS}/first/fold_1/predictions.csv", "checksum"):
        existing_run(runs_folder(RUNS), "first")
    storage.delete("first/fold_1/predictions.csv")
    with refuses("run-damaged", f"{RUNS}/first/fold_1/predictions.csv"):
        existing_run(runs_folder(RUNS), "first")


@pytest.mark.parametrize("name", ["../../../out.csv", "/tmp/out.csv", "a/../../b", ".share"])
def test_a_manifest_leads_nowhere_else(storage, tmp_path, name):
    published()
    manifest = json.loads(storage.read(f"first/{MANIFEST}"))
    manifest["sha256"][name] = "0" * 64
    storage.write(f"first/{MANIFEST}", json.dumps(manifest).encode())
    with refuses("run-damaged", f"{RUNS}/first/{MANIFEST}"):
        existing_run(runs_folder(RUNS), "first")


def test_publishing_that_ends_half_way_is_no_new_version(storage, monkeypatch):
    folder = published()
    (folder.root / "report.json").write_text('{"new": 1}')
    run = PublishedRun.of(folder)
    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "write", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run.publish(RECORDS)
    with refuses("run-damaged", f"{RUNS}/first/report.json"):
        existing_run(runs_folder(RUNS), "first")
    run.publish(RECORDS)
    assert existing_run(runs_folder(RUNS), "first").report.read_text() == '{"new": 1}'


def test_reading_commands_take_the_address(storage, monkeypatch, tmp_path, capsys):
    published("first", 3)
    published("second", 1, seed=1)
    shutil.rmtree(runs_folder(RUNS, WORK))
    command(compare, monkeypatch, tmp_path, "runs=[first,second]", f"dir={RUNS}", "output=compared")
    assert json.loads((tmp_path / "compared.json").read_text())["baseline"] == "first"
    command(mistakes, monkeypatch, tmp_path, "run=second", f"dir={RUNS}")
    assert "mistakes" in capsys.readouterr().out
    monkeypatch.setenv("RAYCV_RUN_DIR", RUNS)
    assert load_run("first").report["run"] == "first"
    assert load_run("second", dir=RUNS).name == "second"


def test_a_page_that_is_made_again_is_published(storage, monkeypatch, tmp_path):
    published()
    command(report, monkeypatch, tmp_path, "run=first", f"dir={RUNS}")
    assert b"<html" in storage.read("first/report.html")
    assert "first/tables/" in "\n".join(storage.names("first/tables"))


def test_the_chosen_checkpoint_is_fetched(storage):
    published()
    chosen = choose("first", 3, runs_folder(RUNS), None)
    assert (chosen.checkpoints[0] / "raycv.json").read_text() == "{}"
    assert [path.parent.name for path in runs_folder(RUNS).rglob("raycv.json")] == ["checkpoint"]


@pytest.mark.parametrize(
    ("changes", "kind", "part"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "storage-unreachable", "AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://no.such.host.invalid"}, "storage-unreachable", "AWS_ENDPOINT_URL"),
    ],
)
def test_a_storage_that_does_not_answer_is_told_in_words(storage, monkeypatch, changes, kind, part):
    published()
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with refuses(kind, f"{RUNS}/first", part):
        existing_run(runs_folder(RUNS), "first")
    with refuses(kind, RUNS, part):
        Bucket(RUNS).check()


def test_a_missing_bucket_is_told_in_words(storage):
    with refuses("storage-refused", "s3://no-such-bucket/runs", "bucket"):
        Bucket("s3://no-such-bucket/runs").check()
    with refuses("storage-refused", "s3://no-such-bucket/runs"):
        existing_run(runs_folder("s3://no-such-bucket/runs"), "first")


def test_wrong_credentials_are_told_in_words(storage, monkeypatch):
    Bucket(RUNS).check()
    assert storage.names() == [], "the check leaves nothing behind"

    @set_initial_no_auth_action_count(0)
    def checked() -> None:
        Bucket(RUNS).check()

    with refuses("storage-refused", RUNS, "credentials"):
        checked()


@pytest.mark.parametrize(
    ("place", "changes", "kind"),
    [
        (RUNS, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "storage-unreachable"),
        ("s3://no-such-bucket/runs", {}, "storage-refused"),
    ],
)
def test_a_run_in_a_storage_that_cannot_be_used_is_refused_before_ray(
    storage, monkeypatch, tmp_path, capsys, place, changes, kind
):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        command(run_main, monkeypatch, tmp_path, "experiment=quickstart", f"run.dir={place}")
    printed = capsys.readouterr()
    assert ended.value.code == 2
    said_refusal(printed.err, kind, place)
    assert "Ray" not in printed.out
    assert list(tmp_path.glob("mlflow*")) == []


def test_a_name_that_the_bucket_has_is_taken(storage, monkeypatch, tmp_path, capsys):
    published()
    shutil.rmtree(runs_folder(RUNS, WORK))
    with pytest.raises(SystemExit):
        command(run_main, monkeypatch, tmp_path, "experiment=quickstart", f"run.dir={RUNS}", "run.name=first")
    said_refusal(capsys.readouterr().err, "run-exists", f"{RUNS}/first", f"resume=first run.dir={RUNS}")


def test_what_a_run_could_not_publish_is_published_later(storage):
    folder = published()
    for fold in (1, 2):
        storage.delete(f"first/fold_{fold}/{MANIFEST}")
    storage.delete("first/report.json")
    storage.write(f"first/{MANIFEST}", storage.read(f"first/{MANIFEST}").replace(b"report.json", b"gone.json"))
    with FileLock(folder.lock):
        bring_up_to_date(RUNS, "first", lambda _: 5)
        assert "first/report.json" not in storage.names(), "its process is at work"
    bring_up_to_date(RUNS, "first", lambda _: 5)
    assert existing_run(runs_folder(RUNS), "first").finished(5) == [0, 1, 2, 3, 4]
    assert "first/report.json" in storage.names()
    assert not folder.root.exists(), "the copy is one of those that may be deleted"
    assert (runs_folder(RUNS) / "first" / "fold_0" / "checkpoint").is_dir()


def test_a_copy_to_resume_gets_what_it_lacks_and_keeps_what_only_it_has(storage):
    folder = published()
    (folder.root / "report.json").unlink()
    PublishedRun.of(folder).publish(RECORDS)
    for fold in (1, 2):
        storage.delete(f"first/fold_{fold}/{MANIFEST}")
    shutil.rmtree(folder.fold(0).root)
    shutil.rmtree(folder.fold(1).root)
    resumable_copies(folder.root.parent, None)
    assert folder.finished(5) == [0, 2, 3, 4]
    assert (folder.fold(0).checkpoint / "raycv.json").is_file()


def test_a_copy_of_another_run_of_that_name_is_left_alone(storage):
    folder = published()
    share_nonce(folder)
    PublishedRun.of(folder).publish(RECORDS)
    folder.share.write_text("another")
    with refuses("run-exists", folder.root, f"{RUNS}/first", "mv "):
        resumable_copies(folder.root.parent, "first")


def write_state(run: PublishedRun, name: str) -> None:
    state = run.folder.fold(0).state / name
    state.mkdir(parents=True)
    (state / "manifest.json").write_text(name)


def work_copy() -> PublishedRun:
    folder = RunFolder(runs_folder(RUNS, WORK) / "first")
    folder.root.mkdir(parents=True, exist_ok=True)
    run = PublishedRun.of(folder)
    assert run is not None
    return run


def wait_for(there) -> None:
    for _ in range(600):
        if there():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")


def test_only_the_newest_state_is_published_and_a_node_fetches_it(storage):
    run, told = work_copy(), []
    publisher = StatePublisher(run, 0, told.append)
    for name in ("000000-000000005", "000001-000000000"):
        write_state(run, name)
        publisher.offer(name)
        wait_for(lambda name=name: run.newest_state(0) == name)
    wait_for(lambda: not any("000000-" in name for name in storage.names()))
    publisher.stop()
    assert told == []
    state = run.folder.fold(0).state
    shutil.rmtree(state / "000001-000000000")
    bring_states(run, 0, alone=True, tell=told.append)
    assert (state / "000001-000000000" / "manifest.json").read_text() == "000001-000000000"
    write_state(run, "000002-000000000")
    bring_states(run, 0, alone=True, tell=told.append)
    assert (state / "000002-000000000").is_dir(), "newer than what is published"
    bring_states(run, 0, alone=False, tell=told.append)
    assert [path.name for path in state.iterdir()] == ["000001-000000000"], "several workers resume from the same"


def test_a_state_waits_for_a_storage_that_is_away(storage, monkeypatch):
    monkeypatch.setattr("raycv.resources.publisher.PAUSE_SECONDS", 0.1)
    run, told = work_copy(), []
    publisher = StatePublisher(run, 0, told.append)
    storage.stop()
    for name in ("000000-000000005", "000001-000000000"):
        write_state(run, name)
        publisher.offer(name)
    wait_for(lambda: told)
    assert str(run.folder.fold(0).state) in told[0]
    storage.come_back()
    wait_for(lambda: len(told) == 2)
    publisher.stop()
    assert "000001-000000000" in told[1]
    assert run.newest_state(0) == "000001-000000000"


def test_a_fold_begins_without_the_storage_only_if_it_can_have_no_state(storage, monkeypatch):
    monkeypatch.setattr("raycv.results.storage.WAIT_SECONDS", 0.5)
    run, told = work_copy(), []
    storage.stop()
    bring_states(run, 0, alone=True, tell=told.append, begun=False)
    assert told == []
    for alone, begun in ((True, True), (False, False)):
        with refuses("storage-unreachable", f"{RUNS}/first"):
            bring_states(run, 0, alone=alone, tell=told.append, begun=begun)


def test_a_worker_whose_fold_another_has_taken_ends(storage):
    run = work_copy()
    first, second = (StatePublisher(run, 0, print) for _ in range(2))
    write_state(run, "000001-000000000")
    first.offer("000001-000000000")
    wait_for(lambda: run.newest_state(0))
    token = storage.read("first/fold_0/state/writer")
    second.offer("000001-000000000")
    wait_for(lambda: storage.read("first/fold_0/state/writer") != token)
    with refuses("run-busy", f"{RUNS}/first/fold_0/state", error=RunFailedError):
        first.stop()
    second.stop()


def test_a_part_that_another_node_needs_is_waited_for(storage, monkeypatch):
    monkeypatch.setattr("raycv.results.storage.WAIT_SECONDS", 1.0)
    run, told = PublishedRun.of(published()), []
    storage.stop()
    (run.folder.fold(0).result).write_text("{}")
    hand_over(run, "fold_0", told.append, needed=False, where="here")
    assert str(run.folder.fold(0).root) in told[-1]
    with refuses("storage-unreachable", run.folder.fold(0).root, "node 1", error=RunFailedError):
        hand_over(run, "fold_0", told.append, needed=True, where="node 1")


def test_a_node_removes_only_the_copy_of_another_run(tmp_path):
    share = tmp_path / "runs" / "mine" / ".share"
    make_local_copy(share, "one")
    (share.parent / "state").write_text("kept")
    make_local_copy(share, "one")
    assert (share.parent / "state").is_file()
    make_local_copy(share, "two")
    assert share.read_text() == "two"
    assert [path.name for path in share.parent.parent.rglob("*")] == ["mine", ".share"]


@pytest.mark.parametrize(
    ("kind", "warned"), [("nfs4", True), ("fuse.sshfs", True), ("ext4", False), ("fuse.fuse-overlayfs", False)]
)
def test_a_database_on_a_network_file_system_is_warned_of(monkeypatch, kind, warned):
    """The kinds of file systems are simulated: none of these can be mounted on every test machine."""
    mounts = [Mount("/", "ext4"), Mount("/shared", kind), Mount("/sh", "nfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    said = network_warning("sqlite:////shared/mlflow.db")
    assert (said is not None) == warned
    assert not warned or ("/shared/mlflow.db" in said and kind in said and "mlflow server --backend-store-uri" in said)
    assert network_warning("sqlite:////here/mlflow.db") is None
    assert network_warning("http://host:5000") is None


@pytest.mark.parametrize("variable", ["SSH_CONNECTION", "RAY_JOB_CONFIG_JSON_ENV_VAR"])
def test_a_run_on_another_machine_ends_with_how_to_fetch_it(monkeypatch, tmp_path, variable):
    monkeypatch.setenv("RAYCV_CACHE", str(tmp_path))
    for name in ("SSH_CONNECTION", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    local = compose_checked("run", RunConfig, ["experiment=quickstart"])
    served = compose_checked("run", RunConfig, ["experiment=quickstart", "tracking.uri=http://host:5000"])
    shared = RunFolder(Path("/shared/runs/mine"))
    bucket = RunFolder(runs_folder(RUNS, WORK) / "mine")
    assert lines_for_afar(shared, local) is None
    monkeypatch.setenv(variable, "x")
    said = lines_for_afar(shared, local)
    assert "ray rsync-down cluster.yaml /shared/runs/ runs/" in said
    assert "raycv.aggregate run=mine tracking_uri=sqlite:///mlflow.db" in said
    said = lines_for_afar(bucket, local)
    assert f"raycv.report run=mine dir={RUNS}" in said
    assert f"raycv.aggregate run=mine dir={RUNS} tracking_uri=" in said
    assert "aggregate" not in lines_for_afar(bucket, served)
