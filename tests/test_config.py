"""The config: every YAML that ships is usable, every fault is named at once, and no user sees a traceback."""

import dataclasses
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.malformed_config import MALFORMED
from support.refusals import refuses, said_refusal

import raycv
from raycv.config.arguments import for_hydra, quoted, without_verbatim
from raycv.config.command_line import compose, compose_checked, composed
from raycv.config.other_names import OTHER_NAMES, WITHOUT_KEY
from raycv.config.plain import plain_question, plain_values
from raycv.config.schema import (
    AggregateConfig,
    CompareConfig,
    InferConfig,
    MistakesConfig,
    ReportConfig,
    ReproduceConfig,
    RunConfig,
    Section,
    ServeConfig,
    SynthesizeConfig,
)
from raycv.config.validation import fields, meaning, text_keys, validate
from raycv.errors import FaultsError, UserError, shown
from raycv.results.find_run import recorded_config
from raycv.results.run_folder import RunFolder

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# The defaults that the environment may set.
VARIABLES = ("MLFLOW_TRACKING_URI", "RAYCV_RUN_DIR", "RAYCV_AUTOSCALING")


@pytest.fixture(autouse=True, scope="module")
def _plain_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        yield


@cache
def _composed() -> dict[str, Any]:
    return compose("run", [])


def values_under(*overrides: str) -> dict[str, Any]:
    """The defaults with `a.b=value` set as the command line sets it, without the tenth of a second of a composition."""
    values = deepcopy(_composed())
    for override in overrides:
        parsed = OverridesParser.create().parse_override(override)
        *parents, leaf = parsed.key_or_group.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = parsed.value()
    return values


def faults_of(values: Mapping[str, Any]) -> list[str]:
    with pytest.raises(FaultsError) as caught:
        validate(RunConfig, values)
    faults = caught.value.faults
    kinds = {"config-unknown-key" if ": unknown key" in fault else "config-value" for fault in faults}
    assert set(caught.value.kinds) == kinds
    return faults


# --- What ships ------------------------------------------------------------------------------------------------------


def test_there_are_experiments() -> None:
    assert len(EXPERIMENTS) >= 1
    assert "quickstart" in EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid_and_changes_something(name: str) -> None:
    config = validate(RunConfig, compose("run", [f"experiment={name}"]))
    assert config != validate(RunConfig, _composed())


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (folder.name, path.stem)
        for folder in sorted(CONFIGS.iterdir())
        if folder.is_dir() and folder.name != "experiment"
        for path in sorted(folder.glob("*.yaml"))
    ],
)
def test_every_file_of_every_group_is_valid(group: str, name: str) -> None:
    schemas: dict[str, type[Section]] = {"infer": InferConfig, "serve": ServeConfig}
    command = group if group in schemas else "run"
    validate(schemas.get(group, RunConfig), compose(command, [f"{group}={name}"]))


def test_defaults_are_the_specification() -> None:
    config = validate(RunConfig, _composed())

    assert config.model.name == "klyang/MentaLLaMA-chat-7B"  # FR-001
    assert config.model.target_modules == MODULES
    assert (config.data.dir, config.data.criteria_dir) == ("data/redsm5", "data/dsm5")
    assert config.prompt.max_length == 512  # FR-002
    assert (config.cv.folds, config.cv.seed) == (5, 42)  # FR-003
    assert (config.tracking.uri, config.tracking.artifacts) == ("sqlite:///mlflow.db", "mlruns")  # FR-006
    assert config.tracking.experiment == "raycv"
    assert (config.train.epochs, config.train.patience) == (100, 20)  # FR-007
    assert (config.train.batch_size, config.train.effective_batch_size) == (8, 32)
    assert config.train.precision == "auto"
    assert config.train.gradient_checkpointing == "auto"
    assert config.train.imbalance == "weighted_loss"
    assert config.train.seed == 42
    assert (config.dora.r, config.dora.alpha, config.dora.lora_dropout) == (8, 16, 0.05)


def test_every_key_that_ships_has_a_meaning() -> None:
    for schema in (RunConfig, AggregateConfig, SynthesizeConfig):
        for name, field in schema.model_fields.items():
            section = field.annotation
            inner = getattr(section, "model_fields", {name: field})
            assert all(one.description for one in inner.values()), f"{schema.__name__}.{name}"


def test_the_other_commands_compose() -> None:
    assert validate(AggregateConfig, compose("aggregate", [])).run == "latest"
    assert validate(SynthesizeConfig, compose("synthesize", ["out=x"])).posts == 1484
    with refuses("config-value", "out: ", "out=<value>"):
        compose("synthesize", [])


def test_composed_override_reaches_the_config() -> None:
    config = validate(RunConfig, compose("run", ["train.lr=1e-4", "++cv.folds=3", "run.name=a.b-1"]))
    assert (config.train.lr, config.cv.folds, config.run.name) == (1e-4, 3, "a.b-1")


def test_environment_sets_what_differs_between_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("http://host:5000", "/shared/runs", "true"), strict=True):
        monkeypatch.setenv(name, value)
    config = validate(RunConfig, compose("run", []))
    assert (config.tracking.uri, config.run.dir) == ("http://host:5000", "/shared/runs")
    assert config.resources.autoscaling is True
    stated = validate(RunConfig, compose("run", ["tracking.uri=sqlite:///x.db", "run.dir=y"]))
    assert (stated.tracking.uri, stated.run.dir) == ("sqlite:///x.db", "y")


def test_the_stores_of_mlflows_plugins_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = compose("run", ["tracking.uri=my-store://host"])
    with refuses("config-value", "tracking.uri: ", "my-store://host", error=FaultsError):
        validate(RunConfig, values)
    plugin = tmp_path / "my_store-1.0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: my-store\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text("[mlflow.tracking_store]\nmy-store = nothing:Store\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert validate(RunConfig, values).tracking.uri == "my-store://host"


@pytest.mark.parametrize(
    "uri", ["sqlite:///runs.db", "postgresql+psycopg2://host/base", "HTTPS://host", "databricks", "databricks://me"]
)
def test_addresses_of_stores_that_can_be(uri: str) -> None:
    assert validate(RunConfig, values_under(f"tracking.uri={uri}")).tracking.uri == uri


@pytest.mark.parametrize("value", ["perhaps", "1", "[", "${x}"])
def test_environment_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RAYCV_AUTOSCALING", value)
    with refuses("config-value", "resources.autoscaling"):
        validate(RunConfig, compose("run", []))


def test_a_config_file_of_before_the_key_takes_nan_as_empty() -> None:
    values = deepcopy(_composed())
    assert values["data"].pop("missing") == "empty"
    assert validate(RunConfig, values).data.missing == "empty"


def test_configs_cannot_be_changed_afterwards() -> None:
    config = validate(RunConfig, _composed())
    with pytest.raises(ValueError, match="frozen"):
        config.cv.folds = 3


# --- Faults ----------------------------------------------------------------------------------------------------------


def test_all_faults_at_once() -> None:
    values = values_under(
        "cv.folds=1",
        "train.lr=banana",
        "train.learning_rate=1e-4",
        "dora.alfa=3",
        "nonsense=1",
        "prompt.long_post=middle",
        "data.empty=maybe",
        "model.revision=7",
    )
    del values["train"]["epochs"], values["tracking"]
    faults = faults_of(values)

    found = {fault.split(":")[0]: fault for fault in faults}
    assert len(found) == len(faults) == 10
    assert "unknown key" in found["train.learning_rate"]
    assert "did you mean dora.alpha?" in found["dora.alfa"]
    assert "the keys here are: model, dora" in found["nonsense"]
    assert "received 1" in found["cv.folds"]
    assert "received 'banana'" in found["train.lr"]
    for mode in ("head_tail", "head", "tail", "none", "sliding"):
        assert mode in found["prompt.long_post"]
    assert "received 'maybe'" in found["data.empty"]
    assert "received 7" in found["model.revision"]
    assert "received nothing" in found["train.epochs"]
    assert "received nothing" in found["tracking"]


@pytest.mark.parametrize(("override", "received"), MALFORMED, ids=[override for override, _ in MALFORMED])
def test_malformed_value_is_named_with_its_key_and_what_is_expected(override: str, received: str) -> None:
    key = override.split("=")[0]
    (fault,) = faults_of(values_under(override))
    assert fault.startswith(f"{key}: ")
    assert received in f"{fault} "
    expectation = fault.removeprefix(f"{key}: ").split("; received")[0]
    assert len(expectation) > 10
    section, _, leaf = key.partition(".")
    meaning = RunConfig.model_fields[section].annotation.model_fields[leaf].description
    meaning = re.sub(r" \(FR-\d+\)", "", meaning)
    assert fault.endswith(f"(the key means: {meaning})")


# Alike on the command line and in a file: what a person would write, and nothing that a machine would guess.
WELL_FORMED = [
    "cv.max_concurrent=2",
    "cv.max_concurrent=auto",
    "cv.only=[0,2]",
    "cv.only=null",
    "model.target_modules=all-linear",
    "model.target_modules=[q_proj]",
    "model.revision=null",
    "dora.lora_dropout=0",
    "prompt.head_fraction=1",
    "prompt.stride_fraction=1",
    "train.max_grad_norm=null",
    "train.effective_batch_size=8",
    "resources.gpus_per_fold=0.25",
    "resources.gpus_per_fold=0",
    "resources.cpus_per_fold=2",
    "resources.cpus_per_fold=0.01",
    "prompt.max_length=1048576",
    "tracking.uri='sqlite:////a/b.db'",
    "tracking.uri='https://host/a'",
    "tracking.uri='postgresql+psycopg2://user:word@host/db'",
    "tracking.uri='databricks://profile'",
    f"tracking.artifacts='{'é' * 127}'",
    "run.name=2025-11-22_a.b",
    "train.seed=4294967295",
]


@pytest.mark.parametrize("override", WELL_FORMED)
def test_well_formed_value_is_taken(override: str) -> None:
    config = validate(RunConfig, values_under(override))
    key, _, text = override.partition("=")
    section, _, leaf = key.partition(".")
    assert getattr(getattr(config, section), leaf) == OverridesParser.create().parse_override(f"x={text}").value()


def test_unknown_key_names_the_near_one_or_the_section_of_the_same_name() -> None:
    faults = faults_of(values_under("train.epoch=3", "epochs=3", "prompt.folds=5", "cv.zzz=1"))
    assert [fault for fault in faults if fault.startswith("train.epoch:")] == [
        "train.epoch: unknown key; did you mean train.epochs?"
    ]
    assert "epochs: unknown key; did you mean train.epochs?" in faults
    assert "prompt.folds: unknown key; did you mean cv.folds?" in faults
    assert "cv.zzz: unknown key; the keys here are: folds, seed, max_concurrent, only" in faults


@pytest.mark.parametrize(
    ("schema", "override", "said"),
    [
        (InferConfig, "data.missing=text", "data.missing: unknown key; did you mean missing?"),
        (RunConfig, "missing=text", "missing: unknown key; did you mean data.missing?"),
        (InferConfig, "train.precision=bf16", "train.precision: unknown key; did you mean infer.precision?"),
        (RunConfig, "infer.precision=bf16", "infer.precision: unknown key; did you mean train.precision?"),
        (RunConfig, "trian.seed=1", "trian.seed: unknown key; did you mean train.seed?"),
        (RunConfig, "trian.zzz=1", "trian.zzz: unknown key; did you mean train?"),
        (RunConfig, "zzz.zzz=1", "zzz.zzz: unknown key; the keys here are: model, dora, "),
    ],
)
def test_a_key_of_another_command_names_the_one_here(schema: type[Section], override: str, said: str) -> None:
    name = {RunConfig: "run", InferConfig: "infer"}[schema]
    with refuses("config-unknown-key", said, error=FaultsError) as caught:
        validate(schema, compose(name, [f"+{override}"]))
    assert caught.value.faults[0].startswith(said)
    assert len(caught.value.faults) == 1


OTHER_TOOLS = {
    "learning_rate=1e-4": "train.lr",
    "train.learning_rate=1e-4": "train.lr",
    "num_train_epochs=3": "train.epochs",
    "per_device_train_batch_size=4": "train.batch_size",
    "gradient_accumulation_steps=4": "train.effective_batch_size",
    "weight_decay=0.1": "train.weight_decay",
    "lr_scheduler_type=cosine": "train.schedule",
    "max_seq_length=512": "prompt.max_length",
    "lora_r=8": "dora.r",
    "lora.r=8": "dora.r",
    "dora.lora_alpha=16": "dora.alpha",
    "model_name_or_path=x": "model.name",
    "model_name=x": "model.name",
    "output_dir=x": "run.dir",
    "fp16=true": None,
    "deepspeed=x": None,
    "model.load_in_4bit=true": None,
    "dora.use_rslora=true": None,
}


@pytest.mark.parametrize("override", OTHER_TOOLS)
def test_a_name_of_hugging_face_names_the_key_here_or_says_that_raycv_has_none(override: str) -> None:
    key, meant = override.partition("=")[0], OTHER_TOOLS[override]
    with pytest.raises(FaultsError) as caught:
        compose_checked("run", RunConfig, [override])
    said = f"did you mean {meant}?" if meant else "raycv has no such setting"
    assert caught.value.faults == [f"{key}: unknown key; {said}"]
    assert caught.value.kind == "config-unknown-key"


def test_a_command_without_the_key_does_not_offer_it() -> None:
    with pytest.raises(FaultsError) as caught:
        compose_checked("infer", InferConfig, ["learning_rate=1e-4"])
    assert caught.value.faults == ["learning_rate: unknown key; raycv has no such setting here"]


def test_every_name_of_another_tool_has_a_key_that_exists_or_none() -> None:
    from peft import LoraConfig
    from transformers import TrainingArguments

    keys = {key for schema in (RunConfig, InferConfig) for key, _ in fields(schema)}
    leaves = {key.rpartition(".")[2] for key in keys}
    assert set(OTHER_NAMES.values()) <= keys
    assert not WITHOUT_KEY & (leaves | OTHER_NAMES.keys())
    theirs = {field.name for one in (TrainingArguments, LoraConfig) for field in dataclasses.fields(one)}
    # Other versions of these packages have a few others.
    assert len(theirs - leaves - OTHER_NAMES.keys() - WITHOUT_KEY) < len(theirs) / 10


def test_an_option_of_hugging_face_names_the_key_here(tmp_path: Path) -> None:
    assert "--lora_r (did you mean dora.r?)" in refused(tmp_path, "--lora_r", "8")


def test_every_key_of_an_unknown_section_is_named() -> None:
    """A file of another command, say."""
    faults = faults_of(values_under("+data.more.missing=text", "+data.more.zzz=1"))
    assert faults[0] == "data.more.missing: unknown key; did you mean data.missing?"
    assert faults[1].startswith("data.more.zzz: unknown key; the keys here are: dir, criteria_dir, ")


def test_effective_batch_must_hold_whole_micro_batches() -> None:
    (fault,) = faults_of(values_under("train.batch_size=5"))
    assert fault.startswith("train.effective_batch_size: ")
    assert "train.batch_size, which is 5 (it may be: 1, 2, 4, 8, 16, 32); " in fault
    assert "received 32" in fault


def test_a_worker_gets_what_ray_can_count() -> None:
    (fault,) = faults_of(values_under("resources.cpus_per_fold=0.5", "resources.workers_per_fold=51"))
    assert fault.startswith("resources.workers_per_fold: ")
    assert "0.01 of resources.cpus_per_fold" in fault


def test_long_value_is_not_shown() -> None:
    (fault,) = faults_of(values_under(f"train.lr={'x' * 500}"))
    assert "received a value of 500 characters" in fault
    assert "xxx" not in fault


def test_the_value_cannot_forge_the_message() -> None:
    (fault,) = faults_of(values_under("resources.gpus_per_fold='a; received b'"))
    assert fault.startswith("resources.gpus_per_fold: takes one of 'auto', or ")
    assert "received 'a; received b' (" in fault


def test_key_with_a_dot_as_yaml_reads_it_hides_no_other_fault_and_is_not_its_own_hint() -> None:
    """In a YAML file `train.lr: 3` is one key with a dot in it, and not the `lr` of `train`."""
    faults = faults_of({**values_under("train.lr=banana"), "train.lr": 3})
    assert len(faults) == 2
    assert any(fault.startswith("train.lr: ") and "received 'banana'" in fault for fault in faults)
    (unknown,) = (fault for fault in faults if "unknown key" in fault)
    assert "did you mean train.lr?" not in unknown


# --- Paths -----------------------------------------------------------------------------------------------------------

SCHEMAS: dict[str, type[Section]] = {
    "run": RunConfig, "aggregate": AggregateConfig, "report": ReportConfig, "infer": InferConfig, "serve": ServeConfig,
    "synthesize": SynthesizeConfig, "compare": CompareConfig, "mistakes": MistakesConfig,
    "reproduce": ReproduceConfig,
}  # fmt: skip
NO_PATHS = {
    "model.revision", "tracking.experiment", "tracking.uri", "tracking_uri", "post", "criterion", "server",
    "serve.host", "serve.token", "metric", "resources.accelerator_type",
}  # fmt: skip
"""Keys of free text that become no path. (A store has rules of its own.)"""
MAY_SHIP = {"model.name", "data.dir", "data.criteria_dir", "criteria_dir", "base"}
"""Path keys that take raycv:// too."""
ADDRESSES = (
    "s3://bucket/x", "s3:/bucket/x", "gs://b", "hdfs:", "hdfs://host:9000/x", "file:///x", "file:/x", "file:./x",
    "abfs://c@a.dfs.core.windows.net/x", "S3://b/x", "simplecache::s3://b/x", "host:/x", "raycv:/data/sample",
    "mlflow-artifacts:/0",
)  # fmt: skip
PATHS = ("a:b/c", "./s3:/x", "/s3:/x", "a/b:/c", "12:30", "x::y")


def path_keys() -> Iterator[tuple[str, str]]:
    """Command and key of every key that becomes a path: that takes any text of one form and is none of NO_PATHS."""
    for command, schema in SCHEMAS.items():
        # A name of a run has a pattern, and the words of a choice are no text.
        taken = text_keys(schema) - NO_PATHS - {"run.name"}
        yield from ((command, key) for key, field in fields(schema) if key in taken and "Literal" not in repr(field))


@cache
def _values_of(command: str) -> dict[str, Any]:
    required = {"synthesize": ["out=x"], "compare": ["runs=[a,b]"]}
    return compose(command, required.get(command, []))


def with_value(command: str, key: str, value: str) -> dict[str, Any]:
    values = deepcopy(_values_of(command))
    section = values
    *parents, leaf = key.split(".")
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    return values


def test_every_key_that_becomes_a_path_is_known() -> None:
    assert {key for _, key in path_keys()} == MAY_SHIP | {
        "tracking.artifacts", "run.dir", "resume", "run", "dir", "post_file", "input", "output", "out",
        "baseline", "trained", "bundle", "check",
    }  # fmt: skip


@pytest.mark.parametrize(("command", "key"), path_keys())
def test_an_address_is_refused_where_a_path_is_meant(command: str, key: str) -> None:
    """A folder called `s3:` would be made here."""
    schema = SCHEMAS[command]
    takes_a_bucket = key.removeprefix("run.") == "dir"
    for address in (*ADDRESSES, *([] if key in MAY_SHIP else ["raycv://data/sample"])):
        if takes_a_bucket and address.startswith("s3://"):
            validate(schema, with_value(command, key, address))
            continue
        with refuses("config-value", f"{key}: must be a path", f"received {shown(address)}") as caught:
            validate(schema, with_value(command, key, address))
        assert len(caught.value.faults) == 1
    for path in (*PATHS, *(["raycv://models/tiny_llama"] if key in MAY_SHIP else [])):
        validate(schema, with_value(command, key, path))


def test_a_database_has_no_address_for_a_file() -> None:
    (fault,) = faults_of(values_under("tracking.uri='sqlite:///s3://bucket/mlflow.db'"))
    assert fault.startswith("tracking.uri: must be a path")


FIRST_KEYS = {
    "model": "name revision target_modules",
    "dora": "r alpha lora_dropout dropout implementation",
    "data": "dir criteria_dir empty shuffle_labels",
    "prompt": "max_length long_post head_fraction stride_fraction",
    "cv": "folds seed max_concurrent",
    "train": "epochs patience batch_size effective_batch_size eval_batch_size packing batching lr weight_decay "
    "max_grad_norm warmup_steps schedule imbalance precision gradient_checkpointing seed checkpoint_minutes",
    "resources": "gpus_per_fold cpus_per_fold workers_per_fold retries autoscaling ray_logs",
    "tracking": "uri artifacts experiment",
    "privacy": "log_text",
    "run": "name dir",
}
"""What the first version of raycv wrote into `config.yaml`, beside `resume`."""


def test_a_run_of_the_first_version_can_be_resumed(tmp_path: Path) -> None:
    """Its config lacks the keys that came later, and may hold addresses of which it made local folders."""
    recorded = {
        section: {key: _composed()[section][key] for key in keys.split()} for section, keys in FIRST_KEYS.items()
    }
    recorded["run"]["dir"] = recorded["tracking"]["artifacts"] = "s3://bucket/x"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**recorded, "resume": None}))
    try:
        config = recorded_config(RunFolder(tmp_path))
    except UserError as error:
        pytest.fail(f"{error}\nGive a new key a default in the schema that means what earlier versions did.")
    assert config.run.dir == "s3://bucket/x"


# --- Random overrides ------------------------------------------------------------------------------------------------

SECTIONS = {
    name: list(field.annotation.model_fields)
    for name, field in RunConfig.model_fields.items()
    if hasattr(field.annotation, "model_fields")
}
KEYS = [f"{section}.{leaf}" for section, leaves in SECTIONS.items() for leaf in leaves]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=50),
    st.sampled_from(["auto", "on", "none", "latest", "all-linear", "head_tail", "", "5", "a; received b"]),
)
ANY_VALUE = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.sampled_from(KEYS), inner),
    max_leaves=5,
)
ANY_KEY = st.sampled_from(KEYS) | st.sampled_from(list(SECTIONS)) | st.text(max_size=12)


def check_taken_or_refused(values: Mapping[str, Any]) -> list[str]:
    """The faults, none if `values` are a config; any other exception than FaultsError passes through."""
    try:
        config = validate(RunConfig, values)
    except FaultsError as error:
        faults, text = error.faults, str(error)
    else:
        assert validate(RunConfig, config.model_dump()) == config
        return []
    assert text.startswith(f"The configuration cannot be used: {len(faults)} fault")
    assert len(set(faults)) == len(faults) > 0
    assert all(": " in fault and ("unknown key" in fault or "; received " in fault) for fault in faults)
    assert "pydantic" not in text
    return faults


@given(st.lists(st.tuples(ANY_KEY, ANY_VALUE), max_size=4), st.sets(st.sampled_from(KEYS), max_size=2))
@example([("train.lr", "banana"), ("train.lr", 3)], set())
@settings(max_examples=100, deadline=None)
def test_random_values_are_taken_or_refused(overrides: list[tuple[str, Any]], removed: set[str]) -> None:
    values = deepcopy(_composed())
    for key in removed:
        section, leaf = key.split(".")
        del values[section][leaf]
    for key, value in overrides:
        *parents, leaf = key.split(".")
        section = values
        for parent in parents:
            section = section[parent] if isinstance(section.get(parent), dict) else section
        section[leaf] = value
    check_taken_or_refused(values)


@given(
    st.sampled_from(KEYS),
    st.one_of(
        st.from_regex(r"-?[0-9]{1,12}(\.[0-9]{1,5})?(e-?[0-9]{1,3})?", fullmatch=True),
        st.from_regex(r"[A-Za-z_./:-]{0,20}", fullmatch=True),
        st.from_regex(r"\[([a-z0-9]{1,4},){0,3}[a-z]?\]", fullmatch=True),
        st.sampled_from(["null", "true", "off", "''", "{}", "{a:1}", "[[]]", "inf", "nan", "1_000", "0x10", "01", "~"]),
    ),
)
@settings(max_examples=100, deadline=None)
def test_random_overrides_are_taken_or_refused(key: str, text: str) -> None:
    from hydra.errors import HydraException

    try:
        values = values_under(f"{key}={text}")
    except HydraException:
        return  # no override in Hydra's grammar; the command shows what Hydra says, without a traceback
    for fault in check_taken_or_refused(values):
        assert fault.startswith(key.split(".")[0])


def test_shown_quotes_short_values_and_measures_long_ones() -> None:
    assert shown("a'b\n") == repr("a'b\n")
    assert shown("x" * 40) == repr("x" * 40)
    assert shown("x" * 41) == "a value of 41 characters"


# --- The command -----------------------------------------------------------------------------------------------------


def command(cwd: Path, *arguments: str, script: Path | None = None) -> subprocess.CompletedProcess[str]:
    start = [str(script)] if script else ["-m", "raycv.run"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HYDRA_")}
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def resolved(shown_yaml: str) -> Any:
    """What `--cfg job` prints, as plain values."""
    return yaml.safe_load(shown_yaml)


def recorded(config: Any) -> Any:
    """`config` as a run records it, and as `--cfg job` shows it."""
    return {key: value for key, value in config.items() if key != "check"}


def refused(cwd: Path, *arguments: str) -> str:
    """What the command says as it refuses `arguments`: exit code 2, no traceback, nothing written."""
    done = command(cwd, *arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "Error executing job" not in done.stderr
    assert done.stdout == ""
    assert list(cwd.iterdir()) == []
    return done.stderr


def child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--cfg", "job"], 0),
        (["train.lr=banana"], 2),
        (["tracking.uri=bad://x"], 2),
        (["data.dir=/no/such/folder"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_needs_no_model_takes_under_a_second_and_a_half(tmp_path: Path, arguments: list[str], code: int) -> None:
    """Of processor time, the best of three, as the machine may be busy; it is a third of that on an idle one."""
    used = []
    while len(used) < 3 and min(used, default=9) >= 1.5:
        before = child_seconds()
        assert command(tmp_path, *arguments).returncode == code
        used.append(child_seconds() - before)
    assert min(used) < 1.5


def test_refusal_names_all_faults(tmp_path: Path) -> None:
    said = refused(tmp_path, "train.lr=banana", "cv.folds=1", "train.epoch=3", "+dora.q=1", "~cv.seed")
    faults = re.findall(r"- (\S+): .*?(received [\w']+|unknown key; .*)", said)
    assert dict(faults) == {
        "train.lr": "received 'banana'",
        "cv.folds": "received 1",
        "cv.seed": "received nothing",
        "train.epoch": "unknown key; did you mean train.epochs?",
        "dora.q": "unknown key; the keys here are: r, alpha, lora_dropout, dropout, implementation",
    }


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        (["train=5"], "config-value", ["train=5", "train=default", "train.lr=1e-4"]),
        (["experiment=nope"], "config-value", ["experiment=nope", "'nope'", "experiment=quickstart"]),
        (["train.lr=[1"], "config-syntax", ["[1", "python -m raycv.run --help"]),
        (["train.lr=1e-4", "nonsense"], "config-syntax", ["nonsense", "python -m raycv.run --help"]),
        (["data.dir=${oc.env:RAYCV_NOT_SET}"], "config-value", ["data.dir", "RAYCV_NOT_SET", "--cfg job"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_command_line_that_cannot_be_composed(
    tmp_path: Path, arguments: list[str], kind: str, parts: list[str]
) -> None:
    said_refusal(refused(tmp_path, *arguments), kind, *parts)


@pytest.mark.parametrize("argument", ["=5", f"train.epochs={'9' * 5000}"], ids=["=5", "huge"])
def test_what_hydra_itself_stumbles_over_gives_no_traceback(tmp_path: Path, argument: str) -> None:
    said_refusal(refused(tmp_path, argument), "config-syntax", "received", "python -m raycv.run --help")


@pytest.mark.parametrize(
    ("name", "schema", "arguments", "parts"),
    [
        ("compare", CompareConfig, ["runs=a,b"], ["runs: ", "'a,b'", "runs=[a,b]"]),
        ("compare", CompareConfig, ["runs=a"], ["runs: ", "'a'", "runs=[a]"]),
        ("compare", CompareConfig, ["runs=[a,", "b]"], ["runs: ", "2 words", "runs=[a,b]"]),
        ("compare", CompareConfig, ["runs=[a", "b]"], ["runs: ", "2 words", "runs=[a,b]"]),
        ("compare", CompareConfig, ["runs=[a b]"], ["runs: ", "'a b'", "runs=[a,b]"]),
        ("compare", CompareConfig, ["runs=[a,b"], ["runs: ", "'[a,b'", "runs=[a,b]"]),
        ("reproduce", ReproduceConfig, ["folds=0"], ["folds: ", "'0'", "folds=[0]"]),
        ("reproduce", ReproduceConfig, ["folds=0,1"], ["folds: ", "'0,1'", "folds=[0,1]"]),
        ("run", RunConfig, ["cv.only=0"], ["cv.only: ", "'0'", "cv.only=[0]"]),
        ("run", RunConfig, ["train.lr=1,2"], ["train.lr: ", "'1,2'", "train.lr=1"]),
        ("run", RunConfig, ["model.target_modules=q,k"], ["model.target_modules: ", "'q,k'", "[q,k]"]),
        ("run", RunConfig, ["train.lr={"], ["train.lr: ", "'{'", "--help"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_list_that_cannot_be_read_is_refused_in_our_words(
    name: str, schema: type[Section], arguments: list[str], parts: list[str]
) -> None:
    kind = "config-value" if re.fullmatch(r"[\w.]+=[\w,]+", " ".join(arguments)) else "config-syntax"
    with refuses(kind, *parts) as caught:
        compose_checked(name, schema, arguments)
    assert not re.search(r"hydra|Lexer|Ambiguous|multirun", str(caught.value))


@pytest.mark.parametrize(
    ("name", "schema", "argument"),
    [
        ("compare", CompareConfig, "runs=[a, b]"),
        ("compare", CompareConfig, "runs=['a b',c]"),
        ("reproduce", ReproduceConfig, "folds=[0]"),
        ("run", RunConfig, "cv.only=null"),
        ("run", RunConfig, "model.target_modules=all-linear"),
        ("run", RunConfig, "run.dir='a,b'"),
    ],
)
def test_a_list_that_can_be_read_is_taken(name: str, schema: type[Section], argument: str) -> None:
    compose_checked(name, schema, [argument])


@pytest.mark.parametrize("value", ["[]", "[0,0]", "[a]", "[-1]", "[1.5]"])
def test_a_wrong_item_of_a_list_is_refused_in_our_words(value: str) -> None:
    with refuses("config-value", "folds: ", value.strip("[]").split(",")[0]) as caught:
        compose_checked("reproduce", ReproduceConfig, [f"folds={value}"])
    assert not re.search(r"valid|validation|should|Input", str(caught.value))


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_help_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["raycv", "--help"])
    assert composed(name, SCHEMAS[name]) is None
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


def test_a_key_that_several_sections_have_is_not_guessed() -> None:
    (fault,) = faults_of(values_under() | {"seed": 7})
    assert "did you mean cv.seed (" in fault
    assert " or train.seed (" in fault


def test_refused_sweep_writes_nothing(tmp_path: Path) -> None:
    refused(tmp_path, "--multirun", "cv.folds=0,1")


def test_config_is_shown_from_any_folder_and_nothing_is_written(tmp_path: Path) -> None:
    # What lies in the working directory must not be taken for raycv's own.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text("cv: {folds: 99}\n")
    done = command(tmp_path, "--cfg", "job", "experiment=quickstart", "train.lr=5e-4")
    assert done.returncode == 0, done.stderr
    assert resolved(done.stdout) == recorded(compose("run", ["experiment=quickstart", "train.lr=5e-4"]))
    assert {path.name for path in tmp_path.rglob("*")} == {"configs", "run.yaml"}


def test_script_copied_alone_still_composes(tmp_path: Path) -> None:
    """`ray submit cluster.yaml raycv/run.py` copies this one file to the head node."""
    folder = tmp_path / "head node"
    folder.mkdir()
    shutil.copy(Path(raycv.__file__).parent / "run.py", folder)
    done = command(tmp_path, "--cfg", "job", script=folder / "run.py")
    assert done.returncode == 0, done.stderr
    assert resolved(done.stdout) == recorded(_composed())
    assert list(folder.iterdir()) == [folder / "run.py"]


def test_help_shows_every_key_with_its_value_and_meaning(tmp_path: Path) -> None:
    done = command(tmp_path, "experiment=quickstart", "train.lr=0.5", "--help")
    assert done.returncode == 0, done.stderr
    for part in ("python -m raycv.run experiment=quickstart", "prompt.max_length=192", "train.lr=0.5", "shuffled,"):
        assert part in done.stdout
    assert re.search(r"^  model: .*mentallama.*tiny_llama", done.stdout, re.MULTILINE)
    keys = re.findall(r"^  (\w+(?:\.\w+)?)=.*\n      \S", done.stdout, re.MULTILINE)
    assert keys == [key for key, field in fields(RunConfig) if meaning(field)]
    assert {"cv.folds", "privacy.log_text", "resume"} <= set(keys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "2025",
        "1e5",
        "my folder, with = signs",
        "it's",
        'say "x"',
        "tail\\",
        "a\\'b",
        "{a: [b",
        "(x)",
        "true",
        "été",
        "a:b",
    ],
)
def test_text_needs_no_second_quotes(tmp_path: Path, text: str) -> None:
    """Keys that take text take it as it is, though Hydra's grammar would read numbers, lists or nothing at all."""
    done = command(tmp_path, "--cfg", "job", f"tracking.experiment={text}")
    assert done.returncode == 0, done.stderr
    assert resolved(done.stdout)["tracking"]["experiment"] == text


def test_a_home_folder_and_an_interpolation_are_resolved(tmp_path: Path) -> None:
    done = command(tmp_path, "--cfg", "job", "--resolve", "data.dir=~/posts", "run.dir=${oc.env:HOME}/runs")
    assert done.returncode == 0, done.stderr
    values = resolved(done.stdout)
    assert values["data"]["dir"] == f"{Path.home()}/posts"
    assert values["run"]["dir"] == f"{Path.home()}/runs"


def test_the_config_that_is_shown_is_checked(tmp_path: Path) -> None:
    said = refused(tmp_path, "--cfg", "job", "train.epoch=3", "train.lr=5")
    faults = ("train.epoch: unknown key; did you mean train.epochs?", "train.lr: ", "received 5")
    said_refusal(said, "config-value, config-unknown-key", *faults)


def test_a_sweep_is_refused_whatever_its_way_in(tmp_path: Path) -> None:
    for way in ("--multirun", "-m", "hydra.mode=MULTIRUN"):
        said_refusal(refused(tmp_path, way, "train.lr=1e-3,1e-4"), "config-syntax", "--multirun")


def test_the_default_of_a_group_can_be_given(tmp_path: Path) -> None:
    assert command(tmp_path, "--cfg", "job", "experiment=null").returncode == 0


def test_an_option_that_there_is_not_names_the_way_to_say_it(tmp_path: Path) -> None:
    said_refusal(refused(tmp_path, "--epochs", "3"), "config-unknown-key", "--epochs", "train.epochs=3")


# --- Without Hydra and pydantic --------------------------------------------------------------------------------------


def by_hydra(command: str, overrides: Sequence[str]) -> Any:
    """What Hydra composes; the error that it raises if it cannot."""
    try:
        with initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            return OmegaConf.to_container(hydra_compose(command, list(overrides)), resolve=True, throw_on_missing=True)
    except Exception as error:  # noqa: BLE001  (Hydra raises many types)
        return error


@pytest.mark.parametrize("command", sorted(SCHEMAS.keys() - {"compare", "synthesize"}))
def test_the_defaults_of_a_command_are_those_that_hydra_composes(command: str) -> None:
    found = plain_values(command, [])
    assert found is not None
    assert found == by_hydra(command, [])


def test_values_that_must_be_given_are_left_to_hydra() -> None:
    assert plain_values("compare", []) is None
    shown_ones = plain_values("compare", [], missing_ok=True)
    assert shown_ones is not None
    assert shown_ones["runs"] == "???"
    assert plain_values("synthesize", ["++out='x'"]) == by_hydra("synthesize", ["++out='x'"])


TEXTS = (
    "null", "true", "NULL", "nan", "???", "${dir}", "$x", "latest", "runs/a b", "1e5", "0x1", "~/a", "-", "", "é",
    "a\\", "a\\'b", "\\", "'", "a\nb", "\t", "a=b,c", "[a", "{a: [b", "(x)", '"', "#a", "a\0b",
)  # fmt: skip
"""As people write them, and what Hydra's grammar and YAML may make of others."""
BARE = (
    "null", "true", "True", "off", "5", "05", "0", "-0", "-3", "1_000", "0x10", "1.50", "01.5", "1e-3", ".5", "5.",
    "nan", "inf", "best", "a", "a.b", "best2", "[1]", "{a:1}", "''", '"a"', "", "~", "???", "${dir}", "9" * 18,
    "9" * 30, "0.10",
)  # fmt: skip
"""Values without quotes."""


def check_composed_alike(*overrides: str) -> None:
    found = plain_values("infer", overrides)
    if found is not None:
        by_both = by_hydra("infer", overrides)
        assert isinstance(by_both, dict), by_both
        # The text shows types too, and NaN as equal to itself.
        assert repr(sorted(found.items())) == repr(sorted(by_both.items()))


@pytest.mark.parametrize("value", [*map(quoted, TEXTS), *BARE])
def test_a_value_is_read_as_hydra_reads_it(value: str) -> None:
    check_composed_alike(f"++fold={value}")


KEYS_GIVEN = [
    *(key for key, _ in fields(InferConfig)), "infer.x", "nokey", "a.b", "run.x", "hydra.job.name", "defaults", "post.x"
]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(KEYS_GIVEN), st.sampled_from([*map(quoted, TEXTS), *BARE])), max_size=3))
@settings(max_examples=80, deadline=None)
def test_values_are_composed_as_hydra_composes_them(given_values: list[tuple[str, str]]) -> None:
    check_composed_alike(*(f"++{key}={value}" for key, value in given_values))


ASKED = {
    "run": ["latest", "runs/a", "a b", "../x", "null", "a" * 200, "s3://b", "/a/b", "-x", "a:b", "~/a", "é", ""],
    "fold": ["best", "ensemble", "0", "3", "-1", "03", "1.0", "null", "none", "99999999"],
    "output": ["text", "json", "x.csv", "null"],
    "dir": ["runs", "/a", "", "x:/y", "${oc.env:HOME}"],
    "server": ["auto", "none", "http://localhost:8000", "", "x"],
    "post_file": ["-", "a.txt", "null", "a\0b"],
    "base": ["null", "a/b", "raycv://models/tiny_llama", "null"],
    "criteria_dir": ["null", "data"],
    "infer.device": ["auto", "cpu", "cuda", "null"],
    "infer.precision": ["auto", "fp32", "bf16", "int8", "fp16"],
    "infer.batch_size": ["1", "16", "0", "-1", "1.5", "01", "9999999999", "auto"],
    "tracking.uri": ["none", "null", "sqlite:///x.db", "bad"],
    "tracking.experiment": ["a", "", "a b", "null"],
    "input": ["null", "a.csv"],
    "engine": ["local", "ray", "null"],
    "missing": ["empty", "text", "no"],
    "post": ["I lie awake, always: {a} ${b} 'x' \\", "", "null", "\udcff", "a\0b"],
    "criterion": ["A.4", "", "[x", "null"],
    "nokey": ["1"],
    "infer": ["default"],
    "~run": ["a"],
    "+run": ["a"],
    "--run": ["a"],
}
ASKED_WORDS = [f"{key}={value}" for key, values in ASKED.items() for value in values] + ["-h", "word", "run"]
RUN_FOLDERS = [None, "runs", "", "a b", "x:/y", "${dir}", "???", "$x"]


def check_asked_alike(words: list[str], runs: str | None = None) -> None:
    """Whatever is taken without the schema is taken with it, with the same values: nothing that it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        if runs is not None:
            patch.setenv("RAYCV_RUN_DIR", runs)
        config = plain_question(words)
        if config is None:
            return
        typed, verbatim = without_verbatim(words, InferConfig)
        composed = by_hydra("infer", for_hydra(typed, InferConfig))
    assert isinstance(composed, dict), composed
    full = validate(InferConfig, composed | verbatim)
    named = {key: vars(value) if hasattr(value, "__dict__") else value for key, value in vars(config).items()}
    assert named == full.model_dump()


def test_each_word_of_a_question_is_taken_or_left_to_the_schema() -> None:
    for word in ASKED_WORDS:
        check_asked_alike([word])
    for runs in RUN_FOLDERS:
        check_asked_alike(["post=a"], runs)


@given(st.lists(st.sampled_from([*ASKED_WORDS, "post=a", "criterion=A.4"]), max_size=4), st.sampled_from(RUN_FOLDERS))
@settings(max_examples=100, deadline=None)
def test_a_question_without_schema_and_hydra_is_the_one_with_both(words: list[str], runs: str | None) -> None:
    check_asked_alike(words, runs)


def test_an_ordinary_question_needs_neither_schema_nor_hydra() -> None:
    config = plain_question(["run=a", "fold=2", "criterion=A.4", "post=${x} null, 'a'", "infer.device=cpu"])
    assert config is not None
    assert (config.run, config.fold, config.criterion, config.post) == ("a", 2, "A.4", "${x} null, 'a'")
    assert (config.infer.device, config.infer.batch_size, config.server) == ("cpu", 16, "auto")
    assert plain_question(["post=a", "run=a", "output=json", "server=http://host:8000", "post_file=-"]) is not None
    assert plain_question(["post=a", "criterion"]) is None


def test_a_comma_in_a_number_is_not_answered_with_an_option_that_raycv_refuses() -> None:
    with refuses("config-value", "train.lr: takes one value", "'1,5e-4'", "train.lr=1.5e-4") as caught:
        compose_checked("run", RunConfig, ["train.lr=1,5e-4"])
    assert "multirun" not in str(caught.value)
