"""The records of a run that others may see: which keys leave its machine, and which may come from a stranger."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml

from raycv.common.secrets import mask_secrets
from raycv.config.schema import RunConfig
from raycv.config.validation import fields
from raycv.errors import counted

RECORDS = ("run.json", "config.yaml", "environment.json")
MOST_OF_A_RECORD = 2**20
MOST_OF_A_TEXT = 4000
"""Characters of a text in a record, or of the id of a criterion."""
LEFT_OUT = ("tracking", "run", "resume")
"""Sections of the config that name places, people and hosts."""
PLACES = ("data.dir", "data.criteria_dir")
VERSIONS = ("raycv", "numpy", "scipy", "scikit-learn", "matplotlib")
"""The packages that the numbers and figures of a bundle depend on."""
ENVIRONMENT = (
    "python", "platform", "processor", "cpus", "memory_bytes", "packages", "numerics", "git", "seeds", "resumed",
)  # fmt: skip
BASE = ("revision", "files", "sha256")
"""The keys of the base model in the `environment.json` of a bundle."""


def read_settings(content: bytes) -> Any:
    # A few aliases of aliases unpack to more than the memory holds.
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, yaml.SafeLoader)):
        raise ValueError("an alias")
    return yaml.safe_load(content)


def check_texts(value: Any) -> None:
    """Raises: ValueError if a text is so long that the search for secrets in it could take hours."""
    if isinstance(value, str) and len(value) > MOST_OF_A_TEXT:
        raise ValueError("a long text")
    if isinstance(value, Mapping | list):
        for one in value:
            check_texts(one)
    if isinstance(value, Mapping):
        check_texts(list(value.values()))


def check_record(name: str, value: Any) -> None:
    """Raises: ValueError, as pydantic's is too, if a record lacks a key, has another one, or an impossible value."""
    from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter

    Version = Annotated[str, Field(pattern=r"^[\w.+!-]{1,40}$")]  # noqa: N806

    class Run(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        format: int
        versions: dict[Literal[VERSIONS], Version | None] = Field(min_length=len(VERSIONS))  # type: ignore[valid-type]
        run: str
        control: bool
        warnings: list[str]
        data: dict[Literal["data_hash", "criteria_hash"], str]
        history: list[list[dict[Literal["f1", "roc_auc"], float]]]
        out_of_memory: list[NonNegativeInt] = Field(min_length=2)
        retries: list[NonNegativeInt] | None

    if name == "run.json":
        Run.model_validate(value)
        if sum(value["out_of_memory"]) > MOST_OF_A_RECORD:
            raise ValueError("too many events")
        return
    if name == "config.yaml":
        scalar = str | int | float | bool | None
        TypeAdapter(dict[str, dict[str, scalar | list[scalar]]]).validate_python(value, strict=True)
        if value != kept_config(value):
            raise ValueError("another key")
        return
    if value.keys() - {*ENVIRONMENT, "base_model"} or value["base_model"].keys() - set(BASE):
        raise ValueError("another key")
    TypeAdapter(dict[str, str | None]).validate_python(value.get("packages", {}), strict=True)


def kept_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the schema has, without places, hosts and people, and with secrets masked."""
    known = {key for key, _ in fields(RunConfig)} - set(PLACES)
    return {
        section: masked({key: value for key, value in keys.items() if f"{section}.{key}" in known})
        for section, keys in config.items()
        if section not in LEFT_OUT and section in known and isinstance(keys, Mapping)
    }


def masked(value: Any) -> Any:
    """The value with secrets in its texts masked. A mask over the written file could break its quotes."""
    if isinstance(value, Mapping):
        return {key: masked(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [masked(one) for one in value]
    return mask_secrets(value) if isinstance(value, str) else value


def contradictions(records: Mapping[str, Any], folds: int, others: Mapping[str, int]) -> list[str]:
    """Returns where records and files have other numbers of folds than the predictions, each in words.

    Args:
        records: `run.json` and `config.yaml`.
        folds: The number of folds in `predictions.csv`.
        others: How many folds further files have, by what they are.
    """
    run, asked = records["run.json"], records["config.yaml"].get("cv", {}).get("folds")
    said = {"config.yaml: cv.folds": asked, "run.json: out_of_memory": len(run["out_of_memory"])}
    said["run.json: history"] = len(run["history"]) or None
    said["run.json: retries"] = None if run["retries"] is None else len(run["retries"])
    return [
        f"{name} says {counted(number, 'fold')}, and predictions.csv has {folds}"
        for name, number in (said | dict(others)).items()
        if number is not None and number != folds
    ]
