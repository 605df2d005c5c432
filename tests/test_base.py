"""The base model: fetched from a hub that fails on demand, read from every real format, with a reproducible head."""

import ctypes
import json
import logging
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.builders import (
    ARCHITECTURES,
    SENTENCES,
    bpe_tokenizer,
    llama_config,
    sentencepiece_files,
    tiny_bert,
    tiny_llama,
    tiny_model,
    wordlevel_tokenizer,
)
from support.hub_base import NAME, REPO, Planted, hub  # noqa: F401
from support.hub_server import HubServer
from support.refusals import refuses

from raycv.config.command_line import compose
from raycv.config.schema import RunConfig
from raycv.config.validation import validate
from raycv.cv.preparation import prepare_base
from raycv.errors import UserError, shown
from raycv.model.base_files import BaseFiles, is_small_file
from raycv.model.base_model import absolute_name, fetch_base
from raycv.model.loading import check_max_length, load_classifier, load_config, load_tokenizer, set_pad_token

WANTED = {"config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "model.safetensors"}


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor{i}": shard for i, shard in enumerate(shards)}}).encode()


BIN_SHARDS = {
    "config.json": b"{}",
    "tokenizer.model": b"sentencepiece",
    "pytorch_model.bin.index.json": index("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
    "pytorch_model-00001-of-00002.bin": b"one",
    "pytorch_model-00002-of-00002.bin": b"two",
    "pytorch_model-99999-of-99999.bin": b"not in the index",
}


def fetch(name: str = NAME, revision: str | None = None) -> BaseFiles:
    return fetch_base(name, revision, base_seconds=0.001)


# ------------------------------------------------------------------------------------------------------ the hub


def test_a_model_is_fetched_once_and_only_what_is_needed(hub):
    commit = hub.add(NAME, REPO)
    found = fetch()
    assert (found.name, found.revision, found.weight_format) == (NAME, commit, "safetensors")
    assert found.files == {file: len(REPO[file]) for file in WANTED}
    assert {path.name for path in found.path.iterdir()} == WANTED
    assert (found.path / "model.safetensors").read_bytes() == REPO["model.safetensors"]
    for file in WANTED:
        assert hub.count(f"/{NAME}/resolve/{commit}/{file}", method="HEAD") == 1

    before = len(hub.requests)
    assert fetch() == found
    # Which commit is `main` now is all that the second call has to ask.
    assert [request.path for request in hub.requests[before:]] == [f"/api/models/{NAME}/revision/main"]


def test_a_commit_that_is_cached_costs_no_request(hub):
    commit = hub.add(NAME, REPO)
    found = fetch(revision=commit)
    before = len(hub.requests)
    assert fetch(revision=commit) == found
    assert len(hub.requests) == before


def test_a_new_commit_on_the_branch_is_fetched(hub):
    first = hub.add(NAME, REPO)
    assert fetch().revision == first
    second = hub.add(NAME, REPO | {"config.json": b'{"new": 1}'})
    found = fetch()
    assert found.revision == second != first
    assert (found.path / "config.json").read_bytes() == b'{"new": 1}'
    assert fetch(revision=first).revision == first


def test_sharded_bin_weights_are_taken_as_the_index_says(hub):
    hub.add(NAME, BIN_SHARDS)
    found = fetch()
    assert found.weight_format == "pytorch_bin"
    assert set(found.files) == set(BIN_SHARDS) - {"pytorch_model-99999-of-99999.bin"}


def test_safetensors_shards_go_before_a_single_bin(hub):
    shards = {f"model-0000{i}-of-00002.safetensors": b"x" for i in (1, 2)}
    files = {"config.json": b"{}", "pytorch_model.bin": b"y", "pytorch_model.bin.index.json": index("z")}
    hub.add(NAME, files | shards | {"model.safetensors.index.json": index(*shards)})
    found = fetch()
    assert found.weight_format == "safetensors"
    assert set(found.files) == {"config.json", "model.safetensors.index.json", *shards}


def test_weights_are_asked_for_last(hub):
    commit = hub.add(NAME, REPO)
    fetch()
    heads = [
        request.path.removeprefix(f"/{NAME}/resolve/{commit}/") for request in hub.requests if request.method == "HEAD"
    ]
    assert heads[-1] == "model.safetensors"


@pytest.mark.parametrize(
    ("part", "method"),
    [
        ("/api/models/", None),
        ("/config.json", "HEAD"),
        ("/config.json", "GET"),
        ("/cdn/", "GET"),
        (".safetensors", "HEAD"),
    ],
)
def test_two_503_then_success(hub, part, method, caplog):
    hub.add(NAME, REPO)
    hub.fail(part, status=503, times=2, method=method)
    assert set(fetch().files) == WANTED
    assert [f"attempt {i} of 3 failed" in text for i, text in enumerate(caplog.messages, 1)] == [True, True]
    assert "HTTP 503" in caplog.text
    answered = [request.status for request in hub.requests if part in request.path and method in (None, request.method)]
    assert answered[:2] == [503, 503]
    assert 503 not in answered[2:]


def test_429_passes_and_its_retry_after_is_kept(hub, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append(seconds) if seconds > 1 else None)
    hub.add(NAME, REPO)
    hub.fail("/api/models/", status=429, times=1, Retry_After="5")
    assert set(fetch().files) == WANTED
    assert 5 <= waits[0] <= 7.5


@pytest.mark.parametrize(("part", "method"), [("/api/models/", None), ("/config.json", "HEAD"), ("/cdn/", "GET")])
def test_a_fault_that_stays_is_met_exactly_three_times(hub, part, method):
    hub.add(NAME, REPO)
    hub.fail(part, status=503, method=method)
    remedies = ("HTTPS_PROXY", "HF_ENDPOINT", f"hf download {NAME}", "model.name")
    with refuses("hub-unreachable", NAME, "3 times", "HTTP 503", *remedies):
        fetch()
    assert hub.count(part, method=method) == 3


def test_half_a_snapshot_is_never_taken_for_a_whole_one(hub):
    commit = hub.add(NAME, REPO)
    hub.fail("/cdn/", status=503, times=3)
    with refuses("hub-unreachable", NAME, "HTTP 503"):
        fetch()
    # The folder of the commit exists now, without weights.
    hub.fail("/api/models/", status=503)
    with refuses("hub-unreachable", NAME, "3 times"):
        fetch()
    with refuses("hub-unreachable", NAME, "3 times"):
        fetch(revision=commit)


def test_a_gated_model_is_refused_at_once_and_says_what_to_do(hub):
    hub.add(NAME, REPO)
    hub.fail("", status=401, code="GatedRepo")
    with refuses("hub-access", "HTTP 401", "license", f"{hub.endpoint}/{NAME}", "hf auth login"):
        fetch()
    assert len(hub.requests) == 1


def test_files_may_be_gated_although_the_list_is_not(hub):
    hub.add(NAME, REPO)
    hub.fail("/resolve/", status=403, code="GatedRepo")
    with refuses("hub-access", NAME, "HTTP 403", "license"):
        fetch()
    assert hub.count("/config.json") == 1


def test_an_unknown_model_is_refused_at_once(hub):
    with refuses("hub-access", "org/typo", "HTTP 404", "model.name", "hf auth login"):
        fetch("org/typo")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("hub_is_up", [True, False])
def test_a_name_without_a_slash_is_first_of_all_a_mistyped_folder(hub, tmp_path, monkeypatch, caplog, hub_is_up):
    """One attempt, even if the hub does not answer, and the near folder before anything about the hub."""
    (tmp_path / "mybert").mkdir()
    monkeypatch.chdir(tmp_path)
    if not hub_is_up:
        hub.stop()
    with refuses("hub-access" if hub_is_up else "hub-unreachable", "mybret is not a folder here") as caught:
        fetch("mybret")
    assert str(tmp_path / "mybret") in caught.value.remedies[0]
    assert "did you mean mybert?" in caught.value.remedies[0]
    assert len(hub.requests) == hub_is_up
    assert caplog.messages == []


def test_a_name_without_a_slash_may_be_a_model_of_the_hub(hub):
    hub.add("gpt2", REPO)
    assert fetch("gpt2").name == "gpt2"


def test_a_bad_token_is_refused_at_once(hub):
    hub.add(NAME, REPO)
    hub.fail("", status=401, X_Error_Message="Invalid credentials in Authorization header")
    with refuses("hub-access", NAME, "HTTP 401", "HF_TOKEN"):
        fetch()
    assert len(hub.requests) == 1


def test_an_unknown_revision_is_refused_at_once(hub):
    hub.add(NAME, REPO)
    with refuses("hub-access", NAME, "v9", "model.revision=null"):
        fetch(revision="v9")
    assert len(hub.requests) == 1


@pytest.mark.parametrize("name", ["a/b/c", "no spaces allowed", "klyang--x/..", "org/" + "x" * 200])
def test_what_is_no_hub_id_is_refused_without_a_request(hub, name):
    with refuses("base-files", f"model.name={shown(name)}", "hub id"):
        fetch(name)
    assert hub.requests == []


def test_a_hub_that_is_down_and_an_empty_cache(hub, caplog):
    hub.stop()
    remedies = ("HTTPS_PROXY", "HF_ENDPOINT", f"hf download {NAME}`", "model.name")
    with refuses("hub-unreachable", NAME, "Connection refused", *remedies):
        fetch()
    assert [f"attempt {i} of 3 failed" in text for i, text in enumerate(caplog.messages, 1)] == [True] * 3


def test_a_hub_that_is_down_and_a_warm_cache(hub, caplog):
    commit = hub.add(NAME, REPO)
    found = fetch()
    hub.stop()
    assert fetch() == found
    assert f"using commit {commit}" in caplog.messages[-1]
    assert caplog.records[-1].levelno == logging.WARNING
    caplog.clear()
    assert fetch(revision=commit) == found
    assert caplog.messages == []
    with refuses("hub-unreachable", NAME, "3 times"):
        fetch(revision="other")


def test_offline_mode(hub, monkeypatch):
    from huggingface_hub import constants

    commit = hub.add(NAME, REPO)
    found = fetch()
    before = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == fetch(revision=commit) == found
    with refuses("hub-unreachable", constants.HF_HUB_CACHE, "org/other", "unset HF_HUB_OFFLINE"):
        fetch("org/other")
    assert len(hub.requests) == before


def test_a_connection_cut_in_the_middle_of_a_file_resumes(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits 1 s before it resumes
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add(NAME, REPO)
    hub.cut("/model.safetensors", after=2500, times=4)
    found = fetch()
    assert (found.path / "model.safetensors").read_bytes() == REPO["model.safetensors"]
    ranges = [request.range for request in hub.requests if "/cdn/" in request.path and "model.safe" in request.path]
    assert "bytes=2000-" in ranges


def test_a_download_that_stays_stalled_ends_after_three_attempts(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add(NAME, REPO)
    hub.cut("/cdn/", after=10, times=99, stall=True)
    with refuses("hub-unreachable", NAME, "3 times"):
        fetch()
    # In each attempt huggingface_hub resumes a stream 5 times if no byte came.
    assert hub.count("/cdn/", method="GET") == 3 * 6


def test_a_file_list_that_never_comes_ends_in_a_timeout(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.add(NAME, REPO)
    hub.cut("/api/models/", after=3, times=99, stall=True)
    with refuses("hub-unreachable", NAME, "3 times"):
        fetch()
    assert hub.count() == 3


def test_threads_of_one_process_fetch_at_once(hub):
    hub.delay = 0.05
    names = [f"org/model{i}" for i in range(4)]
    for name in names:
        hub.add(name, REPO)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fetch, names))
    assert [set(files.files) for files in found] == [WANTED] * 4


def test_a_cache_that_lacks_a_small_file_is_completed(hub):
    commit = hub.add(NAME, REPO)
    found = fetch()
    (found.path / "tokenizer_config.json").unlink()
    assert fetch() == found
    assert hub.count(f"{commit}/model.safetensors", method="HEAD") == 1


def test_a_cache_that_lacks_a_weight_file_is_completed(hub):
    commit = hub.add(NAME, BIN_SHARDS)
    found = fetch()
    (found.path / "pytorch_model-00002-of-00002.bin").unlink()
    assert fetch(revision=commit) == found
    assert hub.count("00001-of", method="HEAD") == 1


def test_a_file_system_without_locks_will_do(hub, monkeypatch):
    from filelock import FileLock

    class Unknown(FileLock):
        def _acquire(self) -> None:
            raise NotImplementedError("flock")

    hub.add(NAME, REPO)
    monkeypatch.setattr("filelock.FileLock", Unknown)
    assert set(fetch().files) == WANTED


def test_the_password_of_a_mirror_is_not_shown(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("http://", "http://ann:s3cret@"))
    for status in (404, 503):
        hub.fail("", status=status, times=3)
        with pytest.raises(UserError) as caught:
            fetch()
        assert "s3cret" not in str(caught.value)
        assert "http://***@127.0.0.1" in str(caught.value)


ADAPTER = {"adapter_config.json": b'{"base_model_name_or_path": "org/other"}', "adapter_model.safetensors": b"x"}


def test_an_adapter_in_a_repository_is_neither_fetched_nor_silent(hub, caplog):
    commit = hub.add(NAME, REPO | ADAPTER)
    for found in (fetch(), fetch(revision=commit)):
        assert set(found.files) == WANTED
        assert {path.name for path in found.path.iterdir()} == WANTED
    assert hub.count("adapter") == 0
    assert f"{NAME} also holds an adapter (adapter_config.json): raycv loads the whole model alone" in caplog.messages


def test_rare_vocabularies_are_fetched_too(hub):
    commit = hub.add(NAME, REPO)
    fetch(revision=commit)
    rare = ("bpe.codes", "source.spm", "dict.txt", "chat_template.jinja", "qwen.tiktoken")
    hub.add(NAME, REPO | {file: f"contents of {file}".encode() for file in rare} | {"vocab.pkl": b"code"})
    found = fetch()
    assert set(found.files) == WANTED | set(rare)
    assert set(found.sums()) == WANTED | set(rare)


def test_a_pinned_commit_that_another_tool_cached_without_its_tokenizer_is_completed(hub):
    from huggingface_hub import snapshot_download

    commit = hub.add(NAME, REPO)
    snapshot_download(NAME, revision=commit, allow_patterns=["config.json", "model.safetensors"])
    assert set(fetch(revision=commit).files) == WANTED


def test_the_xet_transport_is_not_used(hub):
    # It has its own long retries. Every large file of the server names a Xet address where nothing answers.
    hub.add(NAME, REPO)
    fetch()
    assert hub.count("/xet-token") == 0


@pytest.mark.parametrize(
    ("files", "place"),
    [
        ({"config.json": b"{}", "model.gguf": b"x"}, "model.gguf"),
        ({"model.safetensors": b"x"}, "config.json"),
        (
            {k: v for k, v in BIN_SHARDS.items() if "00002-of" not in k},
            "names pytorch_model-00002-of-00002.bin",
        ),
        ({"config.json": b"{}", "model.safetensors.index.json": index("../../x")}, "plain files"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"{"}, "index.json is damaged"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"[]"}, "index.json is damaged"),
        ({"config.json": b"{}", "model.safetensors": b"version https://git-lfs.github.com/spec/v1"}, "git-lfs pointer"),
    ],
)
def test_a_repository_that_is_no_model(hub, files, place):
    hub.add(NAME, files)
    with refuses("base-files", place):
        fetch()


def test_a_token_is_sent_to_the_hub_but_never_shown(hub, monkeypatch):
    token = "hf_" + "s3cret" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    hub.add(NAME, REPO)
    hub.fail("/config.json", status=503)
    with refuses("hub-unreachable", NAME, "HTTP 503") as caught:
        fetch()
    assert {request.authorization for request in hub.requests} == {f"Bearer {token}"}
    assert token not in str(caught.value)


def client(hub: HubServer, home: Path, code: str, **env: str) -> subprocess.Popen:
    """A process of its own with HF_ENDPOINT and HF_HOME set the way a user sets them."""
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    arguments = [sys.executable, "-c", "from raycv.model.base_model import fetch_base\n" + code]
    return subprocess.Popen(arguments, env=keep | own | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_five_processes_at_once_fetch_each_file_once(tmp_path):
    with HubServer(delay=0.3) as hub:
        commit = hub.add(NAME, BIN_SHARDS)
        clients = [client(hub, tmp_path, f"print(fetch_base('{NAME}', '{commit}').path)") for _ in range(5)]
        said = [process.communicate(timeout=60) for process in clients]
        assert [process.returncode for process in clients] == [0] * 5, said
        assert len({out for out, _ in said}) == 1
        used = set(BIN_SHARDS) - {"pytorch_model-99999-of-99999.bin"}
        assert hub.count(method="HEAD") == len(used)
        for file in used:
            assert hub.count(f"/{commit}/{file}", method="HEAD") == 1
        # One list a process, and two more for the one that downloads: the others look into the cache again first.
        assert hub.count("/api/models/") <= 7


def test_the_environment_variables_of_the_hub_are_respected(tmp_path):
    with HubServer() as hub:
        hub.add(NAME, REPO)
        warm = client(hub, tmp_path, f"print(fetch_base('{NAME}', None).path)")
        out, _ = warm.communicate(timeout=60)
        assert out.startswith(str(tmp_path))
        before = len(hub.requests)
        code = f"import sys; print(fetch_base('{NAME}', None).path); print('torch' in sys.modules)"
        offline = client(hub, tmp_path, code, HF_HUB_OFFLINE="1")
        assert offline.communicate(timeout=60)[0] == out + "False\n"
        assert len(hub.requests) == before


@pytest.mark.parametrize(
    ("switch", "said"),
    [
        ({"HF_HUB_ENABLE_HF_TRANSFER": "1"}, "complete:"),
        ({"HF_HUB_ETAG_TIMEOUT": "soon"}, "complete:"),
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "10.5"}, "complete:"),
        ({"HF_HUB_ETAG_TIMEOUT": "-1"}, "complete:"),
        ({"HF_TOKEN": "hf_€"}, "with the settings of its client: UnicodeEncodeError"),
        ({"HF_ENDPOINT": "hf-mirror.example"}, "No scheme supplied"),
        ({"TRANSFORMERS_OFFLINE": "1"}, "unset TRANSFORMERS_OFFLINE"),
    ],
)
def test_switches_of_the_client_are_neutral_or_refused_in_words(tmp_path, switch, said):
    code = (
        "from raycv.errors import UserError\n"
        f"try: print('complete:', fetch_base('{NAME}', None).path)\n"
        "except UserError as error: print(error)"
    )
    with HubServer() as hub:
        hub.add(NAME, REPO)
        process = client(hub, tmp_path, code, **switch)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert said in out
    assert ("is not a whole number of seconds" in err) == ("TIMEOUT" in next(iter(switch)))


@pytest.mark.parametrize("switch", [{"USE_TF": "1"}, {"USE_TORCH": "0"}])
def test_a_shell_that_is_set_up_for_tensorflow_computes_with_torch(switch):
    code = (
        "import raycv.model.base_model; from transformers.utils import is_torch_available; print(is_torch_available())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | switch, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_waiting_process_says_so(hub, tmp_path, caplog):
    from filelock import FileLock

    caplog.set_level(logging.INFO, logger="raycv.model")
    hub.add(NAME, REPO)
    path = tmp_path / "cache" / ".locks" / "raycv--org--model.lock"
    path.parent.mkdir(parents=True)
    held = threading.Event()

    def hold() -> None:
        with FileLock(path):
            held.set()
            time.sleep(0.3)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(5)
    fetch()
    holder.join()
    assert "waiting for another process that downloads org/model" in caplog.messages


# -------------------------------------------------------------------------------------------------- local folders


def folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if "/" not in name:
            (path / name).write_bytes(content)
    return path


def test_a_folder_is_taken_as_it_is(tmp_path):
    path = folder(tmp_path / "m", REPO)
    found = fetch(str(path))
    assert (found.path, found.revision, found.weight_format) == (path, None, "safetensors")
    assert found.files == {file: len(REPO[file]) for file in WANTED}


def test_a_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    folder(tmp_path / "models" / "m", REPO)
    monkeypatch.chdir(tmp_path)
    assert fetch("models/m").path == tmp_path / "models" / "m"
    assert absolute_name("models/m") == absolute_name("./models/m") == str(tmp_path / "models" / "m")
    assert absolute_name(NAME) == NAME
    assert absolute_name("raycv://models/x") == "raycv://models/x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("~/models/m").path == tmp_path / "models" / "m"


def test_what_ships_with_raycv_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("raycv.common.locations.PACKAGE", tmp_path / "raycv")
    path = folder(tmp_path / "models" / "m", REPO)
    assert fetch("raycv://models/m").path == path
    assert fetch("raycv://models/m").name == "raycv://models/m"


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "no config.json; it holds no files"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "an adapter"),
        ({"config.json": b"{}"}, "pytorch_model.bin"),
        (
            {k: v for k, v in BIN_SHARDS.items() if "00002-of" not in k},
            "pytorch_model-00002-of-00002.bin",
        ),
        ({"config.json": b"{}", "model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path, files, named):
    with refuses("base-files", tmp_path / "m", named):
        fetch(str(folder(tmp_path / "m", files)))


@pytest.mark.parametrize("folder_name", ["m", "it's a model"])
def test_an_adapter_beside_a_whole_model_is_refused_until_it_is_moved(tmp_path, folder_name):
    path = folder(tmp_path / folder_name, REPO | ADAPTER)
    with refuses("base-files", path, "adapter_config.json") as caught:
        fetch(str(path))
    move, merge = caught.value.remedies
    assert "merge_and_unload" in merge
    subprocess.run(move.partition("move the adapter away: ")[2], shell=True, check=True)
    assert set(fetch(str(path)).files) == WANTED
    assert {file.name for file in (tmp_path / f"{folder_name}-adapter").iterdir()} == set(ADAPTER)


@pytest.mark.long
def test_every_vocabulary_that_a_tokenizer_reads_is_recorded():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
    from transformers.tokenization_utils_base import (
        ADDED_TOKENS_FILE,
        CHAT_TEMPLATE_FILE,
        FULL_TOKENIZER_FILE,
        SPECIAL_TOKENS_MAP_FILE,
        TOKENIZER_CONFIG_FILE,
    )

    classes = [tokenizer_class_from_name(name) for pair in TOKENIZER_MAPPING_NAMES.values() for name in pair if name]
    names = {name for each in classes for name in (getattr(each, "vocab_files_names", None) or {}).values() if name}
    assert {"tokenizer.json", "vocab.txt", "merges.txt", "spiece.model", "bpe.codes"} <= names
    # transformers runs the code in this pickle if TRUST_REMOTE_CODE is set.
    assert [name for name in sorted(names) if not is_small_file(name)] == ["vocab.pkl"]
    saved = [CHAT_TEMPLATE_FILE, SPECIAL_TOKENS_MAP_FILE, ADDED_TOKENS_FILE, TOKENIZER_CONFIG_FILE, FULL_TOKENIZER_FILE]
    assert all(map(is_small_file, [*saved, "qwen.tiktoken", "tekken.json"]))


def quantised() -> dict[str, tuple[dict, str]]:
    """What transformers, AutoGPTQ, AWQ and MLX leave beside quantised weights: the change of the config, the method."""
    from transformers import AwqConfig, FineGrainedFP8Config, GPTQConfig

    def key(config: object) -> dict:
        return {"quantization_config": json.loads(json.dumps(config.to_dict(), default=str))}

    return {
        "gptq": (key(GPTQConfig(bits=4)), "gptq"),
        "awq": (key(AwqConfig(bits=4)), "awq"),
        "bitsandbytes": (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes",
        ),
        "older bitsandbytes": ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        "fp8": (key(FineGrainedFP8Config()), "fp8"),
        "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "method not named"),
        "in a part": (
            {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
            "compressed-te",
        ),
    }


@pytest.mark.parametrize("way", ["folder", "hub"])
def test_quantised_weights_are_refused_by_name_before_anything_is_loaded(hub, tmp_path, way):
    plain = json.loads(REPO["config.json"])
    for number, (change, method) in enumerate(quantised().values()):
        files = REPO | {"config.json": json.dumps(plain | change).encode()}
        if way == "hub":
            hub.add(NAME, files)
        name = NAME if way == "hub" else str(folder(tmp_path / str(number), files))
        with refuses("base-unsuitable", f"weights of {name} ", f"({method}"):
            fetch(name)
    # Nothing of the gigabytes was fetched.
    assert hub.count("/model.safetensors") == 0
    for file, method in (("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ")):
        named = folder(tmp_path / method, REPO | {file: b"{}"})
        with refuses("base-unsuitable", f"weights of {named} ", f"({method})", f"remove {named / file}"):
            fetch(str(named))
    hub.add(NAME, REPO | {"config.json": b'{"quantization_config": null, "model_type": "x"}'})
    assert set(fetch().files) == WANTED


def test_a_missing_folder_and_a_revision_of_a_folder(tmp_path):
    with refuses("base-files", f"folder {tmp_path / 'typo'}"):
        fetch(str(tmp_path / "typo"))
    with refuses("base-files", f"folder {Path.cwd() / 'typo'}"):
        fetch("./typo")
    with refuses("config-value", "model.revision=main", tmp_path / "m", "model.revision=null"):
        fetch(str(folder(tmp_path / "m", REPO)), "main")


# -------------------------------------------------------------------------------------------------------- loading


FORMATS = {
    "one safetensors": {},
    "sharded safetensors": {"shard": "20KB"},
    "one bin": {"weights": "bin"},
    "sharded bin": {"weights": "bin", "shard": "20KB"},
}


def loaded(path: Path, seed: int = 1, dtype: str = "float32"):
    import torch

    files = fetch(str(path))
    return load_classifier(files, load_tokenizer(files), getattr(torch, dtype), seed=seed)


def logits(path: Path, **options):
    """float32 [5, 2] of SENTENCES, padded."""
    import torch

    model = loaded(path, **options)
    tokenizer = load_tokenizer(fetch(str(path)))
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reference(llama):
    return logits(llama)


@pytest.mark.parametrize("saved", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_logits(tmp_path, reference, saved):
    path = tiny_llama(tmp_path, **saved)
    assert ("shard" in saved) == (len(list(path.glob("*-of-*"))) > 1)
    assert fetch(str(path)).weight_format == ("pytorch_bin" if "weights" in saved else "safetensors")
    assert logits(path).equal(reference)


class Opened:
    """The names in a folder that this process opens while the block runs, by native code too: the kernel reports it."""

    OPEN, NONBLOCKING = 0x20, 0o4000

    def __init__(self, path: Path) -> None:
        self.path, self.names = path, set()

    def __enter__(self) -> set[str]:
        libc = ctypes.CDLL(None, use_errno=True)
        self.queue = libc.inotify_init1(self.NONBLOCKING)
        assert libc.inotify_add_watch(self.queue, os.fsencode(self.path), self.OPEN) >= 0, os.strerror(
            ctypes.get_errno()
        )
        return self.names

    def __exit__(self, *_: object) -> None:
        with open(self.queue, "rb", buffering=0) as queue:
            while events := queue.read(2**20):
                while events:
                    _, mask, _, size = struct.unpack_from("iIII", events)
                    assert not mask & 0x4000, "the kernel dropped events"
                    # Without a name: the folder itself.
                    self.names.add(events[16 : 16 + size].rstrip(b"\0").decode())
                    events = events[16 + size :]
        self.names.discard("")


def decoys(path: Path, adapted: Path) -> set[str]:
    """Puts into `path` what transformers, PEFT and the Trainer leave beside a model: all of it of another model."""
    import torch

    before = set(os.listdir(path))
    other = {key: torch.full_like(value, 7.0) for key, value in loaded(path).state_dict().items()}
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(adapted), "r": 4, "target_modules": ["q_proj"]}
    texts = {
        "adapter_config.json": json.dumps(adapter),
        "chat_template.jinja": "{{ messages }}",
        "modeling_llama.py": "raise SystemExit",
        "README.md": "# a model",
    }
    for name, text in texts.items():
        if name not in before:
            (path / name).write_text(text)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tf_model.h5", "flax_model.msgpack"):
        if name not in before:
            torch.save(other, path / name)
    for name in ("adapter_model", "model.fp16", "consolidated"):
        save_file(other, path / f"{name}.safetensors", metadata={"format": "pt"})
    (path / "additional_chat_templates").mkdir()
    return set(os.listdir(path)) - before


@pytest.mark.parametrize("saved", FORMATS.values(), ids=FORMATS)
def test_only_recorded_files_are_opened_and_the_backbone_is_theirs(tmp_path, llama, saved):
    """Whatever is put beside them, an adapter of another base included, once they were looked at."""
    import torch

    path = tiny_llama(tmp_path / "base", seed=3, **saved)
    files = fetch(str(path))
    planted = decoys(path, llama)
    assert {"adapter_config.json", "chat_template.jinja", "tf_model.h5"} <= planted
    assert "pytorch_model.bin" in planted or files.files.keys() & {"pytorch_model.bin"}
    with Opened(path) as opened:
        tokenizer = load_tokenizer(files)
        load_config(files)
        model = load_classifier(files, tokenizer, torch.float32, seed=1)
    weights = {name for name in files.files if name.endswith((".safetensors", ".bin"))}
    # By Rust code both; so the watch would have seen the others.
    assert weights | {"config.json", "tokenizer.json"} <= opened
    assert opened <= files.files.keys()
    expected = {}
    for name in weights:
        expected |= load_file(path / name) if name.endswith(".safetensors") else torch.load(path / name)
    found = {key: value for key, value in model.state_dict().items() if not key.startswith("score.")}
    assert len(found) == 2 * 9 + 2
    assert all(value.equal(expected[key]) for key, value in found.items())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_watch_sees_what_transformers_alone_would_open(tmp_path, llama):
    """The check of the check: an adapter's config replaces the model. Whether its weights fit does not matter here."""
    from transformers import AutoModelForSequenceClassification

    path = tiny_llama(tmp_path / "base", seed=3)
    decoys(path, llama)
    with Opened(path) as opened, suppress(RuntimeError, ValueError):
        AutoModelForSequenceClassification.from_pretrained(path)
    assert "adapter_config.json" in opened
    assert "model.safetensors" not in opened


def test_an_adapter_in_a_cached_snapshot_of_another_tool_is_not_attached(hub, llama):
    import torch

    hub.add(NAME, llama)
    found = fetch()
    (found.path / "adapter_config.json").write_bytes(ADAPTER["adapter_config.json"])
    for files in (fetch(), fetch(revision=found.revision)):
        assert files == found
        model = load_classifier(files, load_tokenizer(files), torch.float32, seed=1)
        assert model.state_dict().keys() == loaded(llama).state_dict().keys()


def test_weights_that_the_config_names_are_refused(tmp_path, llama):
    path = tiny_llama(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    other = str(llama / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config | {"transformers_weights": other}))
    with refuses("base-files", path / "config.json", "transformers_weights=", "remove transformers_weights from"):
        loaded(path)
    (path / "config.json").write_text(json.dumps(config | {"transformers_weights": "model.safetensors"}))
    loaded(path)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file"])
def test_a_vocabulary_of_another_folder_is_refused(tmp_path, llama, key):
    path = tiny_llama(tmp_path / "m")
    config = json.loads((path / "tokenizer_config.json").read_text())

    def name(value: object) -> None:
        (path / "tokenizer_config.json").write_text(json.dumps(config | {key: value}))

    name(str(llama / "tokenizer.json"))
    with refuses("base-files", path / "tokenizer_config.json", f"{key}=", f"remove {key} from tokenizer_config.json"):
        load_tokenizer(fetch(str(path)))
    name(str(path / "tokenizer.json"))
    load_tokenizer(fetch(str(path)))


def test_what_is_loaded_names_the_folder_itself(tmp_path, monkeypatch):
    """A tokenizer copies its sentencepiece model when it is saved: the folder of links is gone by then."""
    import torch

    (tmp_path / "temporary").mkdir()
    # The machine's own holds the folders of other tests.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = sentencepiece_files(tiny_llama(tmp_path / "m", tokenizer=False, vocab=400))
    files = fetch(str(path))
    tokenizer = load_tokenizer(files)
    model = load_classifier(files, tokenizer, torch.float32, seed=1)
    assert tokenizer.name_or_path == model.name_or_path == model.config.name_or_path == str(path)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (path / "tokenizer.model").read_bytes()
    assert not list((tmp_path / "temporary").glob("raycv-base-*"))
    (path / "config.json").write_text("{")
    with refuses("base-files", "config of", f"from {path}") as caught:
        load_config(files)
    assert "raycv-base-" not in str(caught.value)


def test_fp16_shards_load_in_the_dtype_asked_for(tmp_path, reference):
    import torch

    path = tiny_llama(tmp_path, weights="bin", shard="20KB", dtype="float16")
    for name in ("float32", "bfloat16", "float16"):
        assert {p.dtype for p in loaded(path, dtype=name).parameters()} == {getattr(torch, name)}
    torch.testing.assert_close(logits(path), reference, atol=1e-3, rtol=0)


def test_loading_from_a_hub_asks_the_hub_for_nothing_more(hub, llama, monkeypatch):
    import torch

    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", False)
    hub.add(NAME, llama)
    files = fetch()
    before = len(hub.requests)
    model = load_classifier(files, load_tokenizer(files), torch.float32, seed=1)
    assert len(hub.requests) == before
    assert model.score.weight.equal(loaded(llama).score.weight)


def test_the_classifier_is_set_up(llama):
    model = loaded(llama)
    config = model.config
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert (config.num_labels, config.id2label) == (2, {0: "unmatched", 1: "matched"})
    assert config.label2id == {"unmatched": 0, "matched": 1}
    assert (config.use_cache, config.pad_token_id) == (False, 0)
    assert not model.training
    assert model.score.weight.shape == (2, 32)


def test_the_head_depends_on_the_seed_alone(tmp_path, llama):
    import torch

    torch.manual_seed(11)
    one = loaded(llama, seed=1).score.weight
    torch.manual_seed(12)
    assert loaded(llama, seed=1).score.weight.equal(one)
    assert not loaded(llama, seed=2).score.weight.equal(one)
    other_format = tiny_llama(tmp_path, weights="bin", shard="20KB")
    assert loaded(other_format, seed=1).score.weight.equal(one)
    assert loaded(llama, seed=1, dtype="bfloat16").score.weight.equal(one.bfloat16())
    assert 0.005 < one.std() < 0.05
    assert one.abs().min() > 0


def test_the_global_random_state_is_left_alone(llama):
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    loaded(llama)
    assert torch.get_rng_state().equal(before)


def test_a_head_that_came_with_the_checkpoint_is_replaced(tmp_path, llama):
    import torch
    from transformers import LlamaForSequenceClassification

    for labels in (2, 3):
        trained = LlamaForSequenceClassification.from_pretrained(llama, num_labels=labels)
        with torch.no_grad():
            trained.score.weight.fill_(7.0)
        path = tmp_path / str(labels)
        trained.save_pretrained(path)
        load_tokenizer(fetch(str(llama))).save_pretrained(path)
        assert loaded(path, seed=1).score.weight.equal(loaded(llama, seed=1).score.weight)


def test_padding_does_not_change_the_logits(llama):
    import torch

    files = fetch(str(llama))
    tokenizer, model = load_tokenizer(files), loaded(llama)
    one = tokenizer(SENTENCES[0], return_tensors="pt")
    padded = tokenizer(SENTENCES[0], padding="max_length", max_length=128, truncation=True, return_tensors="pt")
    assert padded["input_ids"].shape == (1, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(**one).logits, model(**padded).logits, atol=1e-6, rtol=1e-5)


def test_bert_loads_too(tmp_path):
    import torch

    path = tiny_bert(tmp_path / "bert")
    first = logits(path)
    assert first.shape == (5, 2)
    torch.manual_seed(99)
    assert logits(path).equal(first)


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    path = tiny_llama(tmp_path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with refuses("base-files", path, "1 tensor", "model.layers.1.mlp.up_proj.weight"):
        loaded(path)


def test_a_config_of_another_size_is_refused(tmp_path):
    path = tiny_llama(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with refuses("base-files", path, "config.json", "of another shape"):
        loaded(path)


def prepared(path: Path):
    """The preparation of a run, before Ray, with the base model of `path`."""
    words = ["experiment=quickstart", f"model.name={path}", "prompt.max_length=100", "model.target_modules=all-linear"]
    return prepare_base(validate(RunConfig, compose("run", words)))


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_weights_that_do_not_fit_are_refused_before_ray_from_their_headers(tmp_path, monkeypatch, shard):
    path = tiny_llama(tmp_path, shard=shard)
    prepared(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    first = "model.layers.0.mlp.down_proj.weight"
    with refuses("base-files", path, "6 tensors", f"{first}. It is [32, 64]", "[32, 48] by config.json"):
        prepared(path)
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with refuses("base-files", path, "9 tensors", "model.layers.2.", "missing in the weights"):
        prepared(path)
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with refuses("base-files", path, "no place for 9 tensors", "model.layers.1."):
        prepared(path)


@pytest.mark.parametrize("version", ["4.999.0", "4.40.0", None, "4.x"])
@pytest.mark.parametrize("part", ["model", "pre_tokenizer"])
def test_a_tokenizer_of_a_newer_library_is_refused_with_the_version_to_install(tmp_path, part, version):
    """The library raises a bare Exception: data did not match any variant of untagged enum."""
    path = tiny_llama(tmp_path)
    written = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(written | {part: {"type": "OfTheFuture"}}))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"transformers_version": version}))
    with refuses("base-files", f"The tokenizer of {path}", "untagged enum") as caught:
        prepared(path)
    assert ("transformers 4.999.0 wrote" in str(caught.value)) == (version == "4.999.0")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_headers_of_any_family_are_taken_for_what_they_are(tmp_path, architecture):
    """A language model lacks the head, and names its tensors with another prefix."""
    prepared(tiny_model(tmp_path, architecture))


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_truncated_weights_are_refused(tmp_path, weights):
    path = tiny_llama(tmp_path, weights=weights)
    file = path / ("model.safetensors" if weights == "safetensors" else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:-5000])
    with refuses("base-files", f"weights of {path}", f"from {path}"):
        loaded(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_file_is_refused_and_not_run(tmp_path, zipped):
    import torch

    path = tiny_llama(tmp_path / "m", weights="bin")
    planted = {"model.norm.weight": Planted(tmp_path / "was_run")}
    if zipped:
        torch.save(planted, path / "pytorch_model.bin")
    else:
        (path / "pytorch_model.bin").write_bytes(pickle.dumps(planted))
    with refuses("base-files", f"weights of {path}", "could run code"):
        loaded(path)
    assert not (tmp_path / "was_run").exists()
    # The plant is a live one.
    pickle.loads(pickle.dumps(planted))
    assert (tmp_path / "was_run").exists()


def test_code_beside_the_model_is_never_run(tmp_path):
    path = tiny_llama(tmp_path / "m")
    (path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'was_run')!r})\n")
    config = json.loads((path / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "own_type", "auto_map": own}))
    with refuses("base-files", path, "trust_remote_code"):
        load_config(fetch(str(path)))
    assert not (tmp_path / "was_run").exists()


def test_loading_is_quiet_and_leaves_verbosity_alone(llama, caplog, capfd):
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    loaded(llama)
    assert transformers_logging.get_verbosity() == before
    assert "newly initialized" not in capfd.readouterr().err + caplog.text


def test_max_length_is_checked_against_the_positions():
    from transformers import BloomConfig, XLNetConfig

    check_max_length(llama_config(10, positions=512), 512)
    check_max_length(BloomConfig(), 10**6)
    check_max_length(XLNetConfig(), 10**6)
    with refuses("base-unsuitable", "prompt.max_length=513", "512 positions"):
        check_max_length(llama_config(10, positions=512), 513)


def test_roberta_keeps_positions_for_padding():
    from transformers import RobertaConfig

    roberta = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    check_max_length(roberta, 512)
    with refuses("base-unsuitable", "prompt.max_length=513", "512 positions"):
        check_max_length(roberta, 513)


@pytest.mark.long
def test_dora_at_the_shapes_of_7b_trains_21_356_544_parameters():
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    from raycv.config.command_line import compose
    from raycv.config.schema import RunConfig
    from raycv.config.validation import validate
    from raycv.model.adapters import add_dora

    defaults = validate(RunConfig, compose("run", []))
    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        num_labels=2,
    )
    with torch.device("meta"):
        model = add_dora(AutoModelForSequenceClassification.from_config(config), defaults.model, defaults.dora)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    magnitudes = sum(size for name, size in sizes.items() if "magnitude" in name)
    head = sum(size for name, size in sizes.items() if ".score." in name)
    assert (magnitudes, head) == (1_359_872, 8_192)
    assert sum(sizes.values()) == 21_356_544


# ----------------------------------------------------------------------------------------------------- tokenizers


def ids(tokenizer) -> list[list[int]]:
    return tokenizer([*SENTENCES, "", "Straße 漢字 \n\t x", "  two  spaces "])["input_ids"]


def test_a_sentencepiece_model_alone_loads_fast_and_slow_with_equal_ids(tmp_path):
    from transformers import AutoTokenizer

    path = sentencepiece_files(tiny_llama(tmp_path, tokenizer=False, vocab=400))
    assert {file.name for file in path.iterdir()} >= {"tokenizer.model", "tokenizer_config.json"}
    assert not (path / "tokenizer.json").exists()
    fast = load_tokenizer(fetch(str(path)))
    slow = AutoTokenizer.from_pretrained(path, use_fast=False)
    assert (fast.is_fast, slow.is_fast) == (True, False)
    assert ids(fast) == ids(slow)
    assert fast(SENTENCES[0])["input_ids"][0] == fast.bos_token_id == 1
    assert logits(path).shape == (5, 2)


def test_the_slow_tokenizer_steps_in_when_no_fast_one_can_be_made(tmp_path, monkeypatch, caplog):
    path = sentencepiece_files(tiny_llama(tmp_path, tokenizer=False, vocab=400))
    fast = load_tokenizer(fetch(str(path)))

    def cannot(*_: object, **__: object) -> None:
        raise ValueError("no conversion")

    monkeypatch.setattr("transformers.tokenization_utils_fast.convert_slow_tokenizer", cannot)
    slow = load_tokenizer(fetch(str(path)))
    assert not slow.is_fast
    assert "raycv uses the slow one" in caplog.text
    assert ids(slow) == ids(fast)
    assert (slow.padding_side, slow.truncation_side, slow.pad_token_id) == ("right", "right", 0)


def test_the_pad_token_is_unk_else_eos_and_nothing_is_added(tmp_path):
    path = tiny_llama(tmp_path / "unk")
    tokenizer = load_tokenizer(fetch(str(path)))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    assert len(tokenizer) == load_config(fetch(str(path))).vocab_size
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")

    without_unk = bpe_tokenizer()
    without_unk.unk_token = None
    path = tiny_llama(tmp_path / "eos", tokenizer=without_unk)
    assert load_tokenizer(fetch(str(path))).pad_token == "</s>"

    path = tiny_llama(tmp_path / "own", tokenizer=bpe_tokenizer(pad="[PAD]"))
    assert load_tokenizer(fetch(str(path))).pad_token == "[PAD]"


def test_left_padding_of_the_checkpoint_is_overruled(tmp_path):
    path = tiny_llama(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    left = {"padding_side": "left", "truncation_side": "left"}
    (path / "tokenizer_config.json").write_text(json.dumps(config | left))
    tokenizer = load_tokenizer(fetch(str(path)))
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")


def test_a_pad_token_beyond_the_embedding_is_replaced(tmp_path):
    saved = bpe_tokenizer()
    rows = len(saved)
    saved.add_special_tokens({"pad_token": "[PAD]"})
    assert saved.pad_token_id == rows
    path = tiny_llama(tmp_path, tokenizer=saved, vocab=rows)
    assert load_tokenizer(fetch(str(path))).pad_token == "<unk>"
    assert logits(path).isfinite().all()


def test_no_token_to_pad_with_is_refused(tmp_path):
    saved = wordlevel_tokenizer(["a", "b"])
    saved.unk_token = saved.eos_token = None
    path = tiny_llama(tmp_path, tokenizer=saved)
    with refuses("base-unsuitable", "pad, unk or eos", "pad_token", "tokenizer_config.json"):
        load_tokenizer(fetch(str(path)))


def test_set_pad_token_keeps_config_and_tokenizer_together():
    tokenizer, config = bpe_tokenizer(), llama_config(320)
    with refuses("base-unsuitable", "pad id is None"):
        set_pad_token(tokenizer, config)
    tokenizer.pad_token = "</s>"
    set_pad_token(tokenizer, config)
    assert config.pad_token_id == tokenizer.pad_token_id == 2
    with refuses("base-unsuitable", "pad id is 2", "vocabulary size 2"):
        set_pad_token(tokenizer, llama_config(2))


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    path = tiny_llama(tmp_path, tokenizer=False, vocab=50)
    with refuses("base-files", f"tokenizer of {path}", f"from {path}"):
        load_tokenizer(fetch(str(path)))


def test_the_description_is_plain_and_complete(llama):
    files = fetch(str(llama))
    said = files.describe(load_tokenizer(files), load_config(files))
    assert json.loads(json.dumps(said)) == said
    assert said["weight_format"] == "safetensors"
    assert said["files"]["model.safetensors"] == (llama / "model.safetensors").stat().st_size
    assert said["architectures"] == ["LlamaForCausalLM"]
    assert said["tokenizer_is_fast"] is True
    assert (said["pad_token"], said["pad_token_id"]) == ("<unk>", 0)
    assert said["vocab_size"] == said["tokenizer_size"] == len(bpe_tokenizer())
    assert said["revision"] is None


def test_the_builders_are_deterministic(tmp_path):
    one, two = tiny_llama(tmp_path / "1"), tiny_llama(tmp_path / "2")
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {f.name: f.read_bytes() for f in two.iterdir()}
    assert not logits(one).equal(logits(tiny_llama(tmp_path / "3", seed=1)))


def test_importing_is_cheap():
    code = (
        "import sys, raycv.model.base_files, raycv.model.base_model;"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_cache_that_is_named_relatively_is_loaded_from(hub, tmp_path, monkeypatch, llama):
    """HF_HOME=./hf, as projects have it: transformers gets links to the files, which must lead there."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "hf/hub")
    hub.add(NAME, {path.name: path.read_bytes() for path in llama.iterdir() if path.is_file()})
    found = fetch()
    assert found.path.is_absolute()
    assert load_config(found).model_type == "llama"
