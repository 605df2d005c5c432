"""Every key of every command, and each rule of it: type, limits, meaning, allowed words.

YAML files in `configs/` hold the values. The report of a faulty config names every fault, with the received value and
the expectation of the key (FR-004).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from raycv.common.secrets import mask_secrets
from raycv.common.table_reader import Missing
from raycv.config.values import (
    LEAST_SHARE,
    Auto,
    Fraction,
    FreeText,
    Location,
    NonEmpty,
    PathText,
    Positive,
    RunsPlace,
    Share,
    StoreAddress,
)


class Section(BaseModel):
    """A part of the config. It refuses unknown keys, and does not convert types: `"5"` is not 5."""

    # defer_build spares a command the time to build the schemas of the other commands.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)


class ModelConfig(Section):
    name: Location = Field(description="hub id, local folder, or raycv://models/... (FR-001)")
    revision: NonEmpty | None = Field(description="branch, tag or commit on the hub; null is the newest")
    target_modules: Literal["all-linear"] | list[NonEmpty] = Field(
        description="modules that get DoRA: a list of names, or all-linear"
    )

    @field_validator("target_modules")
    @classmethod
    def _some_modules(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("names no module; give at least one, or all-linear")
        return value


class DoraConfig(Section):
    """DoRA: Liu et al. 2024, arXiv 2402.09353."""

    r: Annotated[int, Field(ge=1, le=65_536)] = Field(description="rank of the low-rank matrices A and B")
    alpha: Positive = Field(description="the low-rank product is scaled by alpha / r")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(description="dropout probability")
    dropout: Literal["lora_path", "peft"] = Field(
        description="lora_path: dropout on the low-rank path only, one product with the base weights; peft: on both"
    )
    implementation: Literal["factored", "peft"] = Field(
        description="factored: raycv's layer, the same function computed faster; peft: PEFT's own"
    )

    @field_validator("implementation")
    @classmethod
    def _peft_has_its_own_dropout(cls, value: str, info: ValidationInfo) -> str:
        if value == "peft" and info.data.get("dropout") == "lora_path" and info.data.get("lora_dropout"):
            raise ValueError("needs dora.dropout=peft, since PEFT's layer knows no other")
        return value


class DataConfig(Section):
    dir: Location = Field(description="folder with the posts and the groundtruth or annotations (FR-012)")
    criteria_dir: Location = Field(description="folder with the criteria, CSV or JSON")
    empty: Literal["drop", "refuse"] = Field(
        description="an empty post or criterion: drop it with its pairs and warn, or refuse the data"
    )
    # Whole config files that users wrote, or copied from a run, may be older than this key, so it has a default.
    missing: Missing = Field(
        default="empty",
        description="a cell that holds nothing but NaN, NULL or the like: empty (data.empty then decides), or text",
    )
    shuffle_labels: bool = Field(
        description="control experiment: permute the labels over the pairs; scores must fall to chance"
    )


class PromptConfig(Section):
    max_length: Annotated[int, Field(ge=16, le=2**20)] = Field(
        description="tokens of one prompt, padding included (FR-002)"
    )
    long_post: Literal["head_tail", "head", "tail", "none", "sliding"] = Field(
        description="how a post over the budget is shortened; none: cut the whole prompt on the right"
    )
    head_fraction: Fraction = Field(
        description="head_tail: share of the kept tokens that come from the post's head (Sun et al. 2019: 128 of 510)"
    )
    stride_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        description="sliding: step between two windows as a share of the window"
    )


class CvConfig(Section):
    folds: Annotated[int, Field(ge=2)] = Field(description="n_splits of StratifiedGroupKFold (FR-003)")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(description="random_state of StratifiedGroupKFold")
    max_concurrent: Auto | Positive = Field(description="folds at once, at most; auto: as many as the resources allow")
    # Recorded configs of earlier versions lack this key, so it has a default.
    only: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        default=None, description="folds to train now, counted from 0; resume= trains the others; null: all"
    )

    @field_validator("only")
    @classmethod
    def _each_once(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("names a fold twice")
        return value


class TrainConfig(Section):
    epochs: Positive = Field(description="epochs, at most (FR-007)")
    patience: Positive = Field(description="stop after this many epochs without a better validation F1 (FR-007)")
    batch_size: Auto | Positive = Field(
        description="pairs in one micro-batch at the start, halved on out-of-memory (FR-007). With packing: as many as "
        "fit the memory of this many longest pairs. auto: the largest passes that fit, for large GPUs"
    )
    effective_batch_size: Positive = Field(
        description="pairs in one optimizer step, at any size of the micro-batch (FR-007)"
    )
    eval_batch_size: Positive = Field(
        description="pairs in one validation batch, counted like train.batch_size; halved on out-of-memory"
    )
    packing: bool = Field(
        description="put prompts one after another in lines instead of padding them; validation and post_grouped "
        "compute a post once for all its criteria. Logits and gradients stay the same, but dropout draws other masks"
    )
    batching: Literal["shuffled", "post_grouped"] = Field(
        description="shuffled: pairs in random order; post_grouped: posts in random order, the pairs of a post together"
    )
    lr: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="AdamW's peak learning rate; adapters want 1e-4 to 3e-4; the default is unproven beyond the "
        "tiny model"
    )
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = Field(description="AdamW's decoupled weight decay")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        description="clip the gradient norm to this; null: no clipping"
    )
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        description="learning rate after the warm-up; linear and cosine reach 0 at the end of the last of `epochs`. "
        "Patience stops most folds long before"
    )
    imbalance: Literal["weighted_loss", "weighted_sampling", "none"] = Field(
        description="answer to class imbalance; the weights come from the training pairs of the fold"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        description="auto: bf16 autocast where the GPU supports it, else fp32 (FR-007)"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        description="recompute activations in the backward pass to save memory; auto: in as few layers as the memory "
        "demands"
    )
    # Whole config files that users wrote, or copied from a run, may be older than this key, so it has a default.
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="torch.compile of the decoder layers: the same losses to rounding; auto: off, until a GPU has "
        "shown that it pays",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        description="seed of head, adapters, order and dropout (FR-009)"
    )
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = Field(
        description="minutes between two training states within an epoch; null: save one after each epoch only"
    )

    @field_validator("gradient_checkpointing", "compile", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        # YAML reads a bare on or off as a boolean, so we turn it back.
        return {"True": "on", "False": "off", "true": "on", "false": "off"}.get(str(value), value)

    @field_validator("imbalance")
    @classmethod
    def _sampling_draws_pairs(cls, value: str, info: ValidationInfo) -> str:
        if value == "weighted_sampling" and info.data.get("batching") == "post_grouped":
            raise ValueError("draws pairs one by one, which train.batching=post_grouped cannot")
        return value

    @field_validator("effective_batch_size")
    @classmethod
    def _whole_micro_batches(cls, value: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size")
        if batch_size not in (None, "auto") and value % batch_size:
            fitting = ", ".join(str(size) for size in range(1, value + 1) if value % size == 0)
            raise ValueError(f"must be a multiple of train.batch_size, which is {batch_size} (it may be: {fitting})")
        return value


class ResourcesConfig(Section):
    gpus_per_fold: Auto | Share = Field(
        description="GPUs of one fold, fractions allowed; auto: 1 a worker where the cluster has GPUs or grows, else 0"
    )
    cpus_per_fold: Auto | Annotated[float, Field(ge=LEAST_SHARE)] = Field(
        description="CPU cores of one fold; auto: the cores are shared out evenly, at least 1 a worker"
    )
    workers_per_fold: Positive = Field(
        description="workers that train one fold together, data-parallel; they share its GPUs and cores evenly"
    )

    @field_validator("workers_per_fold")
    @classmethod
    def _enough_for_each(cls, value: int, info: ValidationInfo) -> int:
        for key in ("gpus_per_fold", "cpus_per_fold"):
            given = info.data.get(key)
            if isinstance(given, float) and 0 < given / value < LEAST_SHARE:
                raise ValueError(f"leaves each worker less than {LEAST_SHARE} of resources.{key}, which is {given:g}")
        return value

    @field_validator("gpus_per_fold")
    @classmethod
    def _whole_beyond_one(cls, value: Any) -> Any:
        if isinstance(value, float) and value > 1 and value != int(value):
            raise ValueError("beyond 1 must be a whole number: Ray shares one GPU, not several")
        return value

    retries: Annotated[int, Field(ge=0, le=1000)] = Field(
        description="restarts of a fold from its last state after one of its processes died; with autoscaling also "
        "nodes that may be left out"
    )
    autoscaling: bool = Field(description="the cluster grows on demand: do not refuse folds that do not fit yet")
    # Recorded configs may be older than these three keys, so they have defaults.
    wait_minutes: Annotated[float, Field(gt=0)] = Field(
        default=60, description="how long the folds wait while no node can hold one, before the run ends"
    )
    accelerator_type: NonEmpty | None = Field(
        default=None, description="the GPU of every fold, as Ray names it, such as L40S or H100; null: any"
    )
    gpu_hour_price: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="price of an hour of one GPU, for the estimate of the run's cost; null: no estimate"
    )
    ray_logs: bool = Field(description="show Ray's own log lines and the workers' output")


class TrackingConfig(Section):
    uri: StoreAddress = Field(description="MLflow tracking URI (FR-006)")
    artifacts: PathText = Field(description="folder of the artifacts of a database store; servers have their own")
    experiment: NonEmpty = Field(description="MLflow experiment")


class PrivacyConfig(Section):
    log_text: bool = Field(
        description="write posts and criteria into predictions.csv, and with it into MLflow; false: text stays in the "
        "data folder"
    )


class RunNameConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = Field(
        description="name of the run's folder and of the MLflow parent; null: the time of its start"
    )
    dir: RunsPlace = Field(
        description="folder that holds the runs; on several nodes, storage that every node sees, or s3://bucket/folder"
    )

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str | None) -> str | None:
        if value == "latest":
            raise ValueError("is taken: `latest` stands for the newest run")
        return value


class RunConfig(Section):
    """The config of `python -m raycv.run`."""

    model: ModelConfig
    dora: DoraConfig
    data: DataConfig
    prompt: PromptConfig
    cv: CvConfig
    train: TrainConfig
    resources: ResourcesConfig
    tracking: TrackingConfig
    privacy: PrivacyConfig
    run: RunNameConfig
    resume: PathText | None = Field(
        description="resume an unfinished run in run.dir (its name, or latest); its other settings stay"
    )
    # A run does not record it.
    check: bool = Field(
        default=False,
        exclude=True,
        description="measure memory and seconds a step where the folds would run, print what the run would take, and "
        "write nothing",
    )

    def without_secrets(self) -> "RunConfig":
        """The config with a masked tracking URI, for processes that do not talk to the tracking store."""
        tracking = self.tracking.model_copy(update={"uri": mask_secrets(self.tracking.uri)})
        return self.model_copy(update={"tracking": tracking})


class AggregateConfig(Section):
    """The config of `python -m raycv.aggregate`."""

    run: PathText = Field(
        description="a run's name or folder, the id of an MLflow parent run, or latest: the newest finished run"
    )
    dir: RunsPlace = Field(description="folder that holds the runs, or s3://bucket/folder")
    tracking_uri: StoreAddress | None = Field(
        description="MLflow store; null: where the run was tracked, for an MLflow id sqlite:///mlflow.db. A store that "
        "lacks the run gets it from the run folder"
    )


class CompareConfig(Section):
    """The config of `python -m raycv.compare`."""

    runs: Annotated[list[PathText], Field(min_length=2)] = Field(
        description="at least two: names or folders of runs, latest, or CSV files of post_id, criterion_id and score"
    )
    baseline: PathText | None = Field(description="the one that the others are compared with; null: the first")
    metric: NonEmpty = Field(description="metric of the sentences, p-values and require=, such as roc_auc")
    require: Literal["better"] | None = Field(
        description="better: exit with 1 unless every other run is shown to be better than the baseline"
    )
    dir: RunsPlace = Field(description="folder that holds the runs, or s3://bucket/folder")
    output: PathText = Field(description="beginning of the files to write: <output>.json, .csv and .svg")

    @field_validator("runs", mode="before")
    @classmethod
    def _numbers_as_names(cls, value: Any) -> Any:
        # YAML reads a name of digits as a number, and a run may have such a name.
        return [str(one) if type(one) is int else one for one in value] if isinstance(value, list) else value


class MistakesDataConfig(Section):
    dir: Location | None = Field(description="folder with the posts; null: where training read them")
    criteria_dir: Location | None = Field(
        description="folder with the criteria; null: beside the posts, or where training read them"
    )


class MistakesConfig(Section):
    """The config of `python -m raycv.mistakes`."""

    run: PathText = Field(description="a run's name or folder, or latest: the newest finished run")
    most: Positive = Field(description="mistakes of each criterion to write, at most")
    text: bool = Field(description="write posts and criteria beside the ids")
    data: MistakesDataConfig
    dir: RunsPlace = Field(description="folder that holds the runs, or s3://bucket/folder")
    output: PathText = Field(description="CSV file to write")


class ReportDataConfig(Section):
    dir: Location | None = Field(
        description="data of the run; they fill in floors, hard negatives and near-duplicates that an earlier version "
        "did not record; null: the run folder alone"
    )


class ReportConfig(Section):
    """The config of `python -m raycv.report`."""

    run: PathText = Field(description="a run's name or folder, or latest: the newest finished run")
    dir: RunsPlace = Field(description="folder that holds the runs, or s3://bucket/folder")
    data: ReportDataConfig
    bundle: PathText | None = Field(description="ZIP file to write for reviewers, without text; null: the page")
    check: PathText | None = Field(description="such a ZIP file, whose numbers are computed again; null: none")

    @field_validator("check")
    @classmethod
    def _not_both(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("bundle") is not None:
            raise ValueError("cannot stand beside bundle=")
        return value


class ReproduceResourcesConfig(Section):
    gpus_per_fold: Auto | Share | None = Field(description="GPUs of one fold; null: as recorded")
    cpus_per_fold: Auto | Annotated[float, Field(ge=LEAST_SHARE)] | None = Field(
        description="CPU cores of one fold; null: as recorded. Another number of threads sums in another order"
    )


class ReproduceConfig(Section):
    """The config of `python -m raycv.reproduce`."""

    run: PathText = Field(description="a run's name or folder, or latest: the newest finished run")
    folds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        description="folds to train again, from 0"
    )
    trained: PathText | None = Field(
        description="a run that has trained these folds again already, which is then compared; null: train them now"
    )
    dir: RunsPlace = Field(description="folder that holds the runs, or s3://bucket/folder")
    data: MistakesDataConfig
    base: Annotated[
        Location | None,
        Field(description="folder or hub id of the run's base model now; null: where training found it"),
    ]
    resources: ReproduceResourcesConfig
    tracking_uri: StoreAddress | None = Field(
        description="MLflow store of the new run; null: where the run was tracked"
    )

    @field_validator("folds")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("names a fold twice")
        return value


Precision = Literal["auto", "fp32", "bf16", "int8"]


class InferenceConfig(Section):
    """How a trained fold computes."""

    # Whole config files that users wrote, or copied from a run, may be older than this key, so it has a default.
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="auto: a GPU where there is one, refused if torch cannot use it; cpu: the processor"
    )
    precision: Precision = Field(
        description="auto: as in training where the device is fast at it, else fp32; int8: on a CPU, may flip labels"
    )
    batch_size: Positive = Field(
        description="prompts computed at once; with packing, as many as fit the memory of this many long ones"
    )


class InferTrackingConfig(Section):
    uri: Literal["none"] | StoreAddress | None = Field(
        description="MLflow tracking URI; null: where the run was tracked; none: do not log the inference"
    )
    experiment: NonEmpty = Field(description="MLflow experiment of inferences, apart from the cross-validations")


# raycv.infer and raycv.serve both choose the model that answers, so they share these types.
AnsweringRun = Annotated[
    PathText,
    Field(
        description="a run's name or folder, an MLflow run id, a checkpoint folder, or latest: the newest finished run"
    ),
]
AnsweringFold = Annotated[
    Literal["best", "ensemble"] | Annotated[int, Field(ge=0)],
    Field(
        description="best: by validation F1; a number; ensemble: the mean of all folds' probabilities and thresholds"
    ),
]
OtherCriteria = Annotated[
    Location | None, Field(description="folder with the criteria; null: where training read them")
]
OtherBase = Annotated[
    Location | None,
    Field(description="folder or hub id of the run's base model now; null: where training found it"),
]


class InferConfig(Section):
    """The config of `python -m raycv.infer`."""

    post: FreeText | None = Field(description="the post: any text, taken literally")
    criterion: FreeText | None = Field(
        description="a criterion in your own words, or an id (A.4) or symptom name of the run; null: each of the run's"
    )
    post_file: PathText | None = Field(description="file that holds the post (UTF-8); - is standard input")
    input: PathText | None = Field(
        description="file of many pairs (.csv, .tsv, .jsonl, .json, .parquet) with a post or text and a criterion or "
        "criterion_id a row. Without such a column each post is scored for every criterion, or for criterion="
    )
    output: PathText = Field(
        description="text, or json: one JSON value on standard output and nothing else; with input=, the file to write "
        "(.csv, .jsonl, .parquet)"
    )
    missing: Missing = Field(
        description="a cell of input= that holds nothing but NaN, NULL, N/A or the like: empty (a bad row), or text"
    )
    engine: Literal["local", "ray"] = Field(
        description="local: this process scores input=; ray: Ray Data scores it over a cluster, with the same scores"
    )
    run: AnsweringRun
    fold: AnsweringFold
    dir: RunsPlace = Field(
        description="folder that holds the runs, or s3://bucket/folder; it remembers which one answered last "
        "(.last_answer.json)"
    )
    criteria_dir: OtherCriteria
    base: OtherBase
    server: NonEmpty = Field(
        description="auto: ask a running raycv.serve of this model, else compute here; none: compute here; or the "
        "address of a scorer, http://host:port (its token: RAYCV_TOKEN)"
    )
    infer: InferenceConfig
    tracking: InferTrackingConfig


class ServerConfig(Section):
    host: NonEmpty = Field(description="address to listen on; one that others can reach needs a token")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(description="port to listen on; 0: any that is free")
    token: Annotated[str, Field(min_length=16)] | None = Field(
        description="requests must send it as `Authorization: Bearer <token>`; RAYCV_TOKEN is safer than typing it"
    )
    replicas: Positive = Field(description="processes that hold the model, at least")
    max_replicas: Positive = Field(
        description="processes that hold the model, at most; Ray Serve adds some while requests wait"
    )
    cpus_per_replica: Auto | Annotated[float, Field(ge=LEAST_SHARE)] = Field(
        description="CPU cores of one replica; auto: the cores of the node, shared out evenly"
    )
    gpus_per_replica: Auto | Share = Field(
        description="GPUs of one replica, fractions allowed; 0: the CPU computes; auto: 1 where the node has some"
    )
    max_queued: Positive = Field(
        description="requests of a replica at most, in work and waiting; further ones get a 503"
    )
    batch_wait_ms: Annotated[float, Field(ge=0, le=1000)] = Field(
        description="milliseconds to wait for further requests to batch; twice that among 8 or more"
    )
    max_pairs: Positive = Field(description="pairs of one request, each of the run's criteria counted")
    max_post_characters: Positive = Field(description="characters of a post or a criterion")
    max_body_bytes: Positive = Field(description="bytes of one request")

    @field_validator("max_replicas")
    @classmethod
    def _not_fewer(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("replicas", 1):
            raise ValueError(f"must be serve.replicas or more, which is {info.data['replicas']}")
        return value


class ServeConfig(Section):
    """The config of `python -m raycv.serve`."""

    run: AnsweringRun
    fold: AnsweringFold
    dir: RunsPlace = Field(
        description="folder that holds the runs, or s3://bucket/folder; raycv.infer finds the scorer there"
    )
    criteria_dir: OtherCriteria
    base: OtherBase
    infer: InferenceConfig
    tracking: InferTrackingConfig
    serve: ServerConfig


class SynthesizeConfig(Section):
    """The config of `python -m raycv.synthesize`."""

    out: PathText = Field(description="folder to write; it may hold an earlier synthetic set, but no other data")
    posts: Positive = Field(description="posts to make; each is paired with every criterion")
    seed: Annotated[int, Field(ge=0)] = Field(description="the same seed gives the same bytes")
    profile: Literal["short", "realistic"] = Field(
        description="short: a few sentences a post; realistic: about 295 words a post, some far over 512 tokens"
    )
    words_mean: Annotated[float, Field(gt=0)] | None = Field(description="words of a post; null: the profile's mean")
    criteria: Positive = Field(description="criteria of a post; beyond nine they repeat under other ids")
