"""Ray Serve: starts and ends a scorer; its replicas keep a model loaded and batch what arrives together."""

import asyncio
import io
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import LoggingConfig

from raycv.common.devices import CPU_FOR_INFERENCE, check_given_gpu
from raycv.config.schema import ServerConfig
from raycv.errors import UserError, counted, last_line
from raycv.inference.answerer import load_answerer
from raycv.inference.log import InferenceWriter, record_answers
from raycv.inference.questions import Answer, Answerer, Question, asked_for
from raycv.orchestration.cluster import node_resources, ray_cluster
from raycv.serving.fingerprint import fingerprint, first_changed
from raycv.serving.http_api import Overloaded, TooManyPairsError, build_api
from raycv.serving.messages import Setup
from raycv.serving.settings import THREADS

APP = "raycv"
DEPLOYMENT = "scorer"
REQUESTS_OF_A_BATCH = 64
CROWD = 8
"""Requests at once, from which a batch waits longer."""
OPEN_SECONDS = 30.0
FLUSH_SECONDS = 10.0


class Scorer:
    """One replica: the model, its API, and the thread that writes to MLflow."""

    def __init__(self, setup: Setup) -> None:
        if setup.own_threads:
            # Ray sets it. Without it torch, which is not imported yet, chooses its own number.
            os.environ.pop(THREADS, None)
        self._setup = setup
        self._limits = setup.config.serve
        self._warnings: list[str] = []
        self._waiting = 0
        # First, since it opens its store while the model loads.
        experiment = setup.config.tracking.experiment
        self._writer = InferenceWriter(setup.store, experiment, lambda: self._waiting > 0) if setup.store else None
        criteria_dir, infer = setup.criteria_dir, setup.config.infer
        if ray.is_initialized() and ray.get_gpu_ids():
            check_given_gpu(CPU_FOR_INFERENCE)
        self._answerer: Answerer = load_answerer(
            setup.chosen, infer, criteria_dir, self._warnings.append, base=setup.config.base
        )
        self._model = self._identity()
        self._fingerprint = fingerprint(
            setup.stamps,
            *(self._model["base_given"] or self._model["base"], self._model["precision"], self._model["device"]),
            self._model["finished"],
        )
        self._symptoms = {key: criterion.symptom for key, criterion in self._answerer.criteria.items()}
        self._started = time.time()
        self._turn = asyncio.Lock()
        self._counts = {"requests": 0, "pairs": 0, "batches": 0, "overloaded": 0}
        if self._writer is not None:
            self._writer.opened.wait(OPEN_SECONDS)

    def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve's name for it."""
        return build_api(self, self._limits)

    def __del__(self) -> None:
        # Ray Serve calls it before a replica ends.
        if writer := getattr(self, "_writer", None):
            writer.close(FLUSH_SECONDS)

    async def score(self, questions: Sequence[Question], log: bool, alone: bool = False) -> dict[str, Any]:
        """The answers to `questions`, computed together with those of requests that arrive at the same time.

        Pairs of one batch change each other's last digits. `alone` computes what a separate process would.
        Raises: UserError if a question cannot be answered, TooManyPairsError, Overloaded.
        """
        self._check(questions)
        if self._waiting >= self._limits.max_queued:
            self._counts["overloaded"] += 1
            raise Overloaded
        self._waiting += 1
        started = time.monotonic()
        try:
            asked = list(questions)
            outcome = (await self._computed([asked]))[0] if alone else await self._batched(asked)
        finally:
            self._waiting -= 1
        if isinstance(outcome, UserError):
            raise outcome
        if log:
            self._log(questions, outcome, time.monotonic() - started)
        self._counts["requests"] += 1
        self._counts["pairs"] += sum(map(len, outcome))
        warnings = self._warnings + self._changed() + (self._writer.warnings() if log and self._writer else [])
        return {"answers": outcome, "criteria": self._symptoms, "model": self._model, "warnings": warnings}

    def _changed(self) -> list[str]:
        """Warns of files that changed: only raycv.infer reads the announcement; others know the address."""
        if self._setup.host != socket.gethostname():  # a replica elsewhere sees other files
            return []
        changed = first_changed(self._setup.stamps)
        return [f"{changed} changed since the scorer started: start it again"] if changed else []

    def health(self) -> dict[str, Any]:
        """The state of this replica: its model, its age, its counts."""
        return {
            "status": "ok",
            "instance": self._setup.instance,
            "fingerprint": self._fingerprint,
            "model": self._model,
            "pid": os.getpid(),
            "uptime_seconds": round(time.time() - self._started, 3),
            "waiting": self._waiting,
            **self._counts,
        }

    def _check(self, questions: Sequence[Question]) -> None:
        pairs = sum(map(len, asked_for(questions, self._answerer.criteria)))
        if pairs > self._limits.max_pairs:
            raise TooManyPairsError(
                f"The request asks for {counted(pairs, 'pair')}; one may ask for {self._limits.max_pairs}.",
                kind="scorer-request",
                remedies=["send fewer at a time", "start the scorer with a larger serve.max_pairs"],
            )

    @serve.batch(max_batch_size=REQUESTS_OF_A_BATCH, batch_wait_timeout_s=0.0)
    async def _batched(self, requests: list[list[Question]]) -> list[list[list[Answer]] | UserError]:
        answers = await self._computed(requests)
        wait = batch_wait_seconds(self._waiting, self._limits.batch_wait_ms)
        self._batched.set_batch_wait_timeout_s(wait)  # type: ignore[attr-defined]
        return answers

    async def _computed(self, requests: list[list[Question]]) -> list[list[list[Answer]] | UserError]:
        # In a thread, so that what arrives meanwhile is taken in and makes the next batch. One at a time: of an
        # ensemble the model is that of one fold after the other.
        async with self._turn:
            return await asyncio.to_thread(self._answer, requests)

    def _answer(self, requests: list[list[Question]]) -> list[list[list[Answer]] | UserError]:
        """The answers to each request, or what is wrong with it."""
        self._counts["batches"] += 1
        try:
            answers = iter(self._answerer.answer([question for request in requests for question in request]))
            return [[next(answers) for _ in request] for request in requests]
        except UserError as error:
            # One's fault is not the others'.
            return [error] if len(requests) == 1 else [self._answer([request])[0] for request in requests]

    def _log(self, questions: Sequence[Question], answers: list[list[Answer]], seconds: float) -> None:
        if self._writer is not None:
            checkpoints, precision = self._setup.chosen.checkpoints, self._model["precision"]
            # The model was loaded before the question came.
            self._writer.put(record_answers(checkpoints, questions, answers, precision, {"seconds_answer": seconds}))

    def _identity(self) -> dict[str, Any]:
        identity, chosen = self._answerer.predictor.identity, self._setup.chosen
        return {
            "run": identity.run,
            "fold": identity.fold,
            "base": identity.base,
            "finished": chosen.finished,
            "named": chosen.run,
            "fold_asked": chosen.fold_asked,
            "parent_id": chosen.parent_id,
            "fold_id": chosen.fold_id,
            "base_given": self._setup.config.base,
            "checkpoints": [str(folder) for folder in chosen.checkpoints],
            "device": self._answerer.predictor.device.type,
            "precision": self._answerer.predictor.computed_in,
            "precision_of_auto": self._answerer.predictor.precision_of_auto,
            "criteria_dir": self._setup.criteria_dir,
        }


@contextmanager
def running(setup: Setup) -> Iterator[None]:
    """The scorer, answering on its host and port until the block ends.

    Raises: UserError if Ray does not start or has no room for it, or the model does not load.
    """
    config = setup.config.serve
    # Only warnings of Serve's own logger: Serve sets its level later.
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)
    # A scorer stays, and so would the dashboard's processes; a cluster that it joins has its own.
    with ExitStack() as ending, ray_cluster(ray_logs=False, dashboard=False):
        _refuse_second_serve()
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        try:
            application = build_application(setup, *replica_resources(config, node_resources()), quiet)
            # Only on this node: the address is one of this machine.
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": config.host, "port": config.port},
                logging_config=quiet,
            )
            serve.run(application, name=APP, logging_config=quiet)
            yield
        except (RuntimeError, RayError) as error:
            raise UserError(
                f"The scorer did not start: {last_line(error)}",
                kind="scorer-failed",
                remedies=["try the model alone: python -m raycv.infer server=none post=... run=..."],
            ) from error
        finally:
            # Ray writes to standard output that the controller, which was asked to end, has ended.
            ending.enter_context(redirect_stdout(io.StringIO()))
            serve.shutdown()


def build_application(setup: Setup, cpus: float, gpus: float, quiet: LoggingConfig) -> Any:
    config = setup.config.serve
    scale: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas > config.replicas:
        bounds = {"min_replicas": config.replicas, "max_replicas": config.max_replicas}
        # At half of what a replica takes: one that refuses the rest never has more, and none would be added.
        target = min(REQUESTS_OF_A_BATCH, max(1, config.max_queued // 2))
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": target}}
    deployment = serve.deployment(
        serve.ingress()(Scorer),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # The replica says 503 itself, as JSON; the proxy does where even that is too much.
        max_ongoing_requests=2 * config.max_queued,
        max_queued_requests=config.max_queued,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=2 * FLUSH_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=quiet,
        **scale,
    )
    return deployment.bind(setup)  # type: ignore[attr-defined]


def batch_wait_seconds(waiting: int, batch_wait_ms: float) -> float:
    """How long the next batch waits for more requests, while `waiting` are under way.

    A single request gets its answer at once. A batch takes little longer than a pair, and threads that compute delay
    the threads that accept requests. So a batch waits if several ask, and twice as long for a crowd.
    """
    return (0 if waiting <= 1 else 1 if waiting < CROWD else 2) * batch_wait_ms / 1000


def _refuse_second_serve() -> None:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise UserError(
        "Ray Serve already runs on this cluster, and its HTTP port cannot be changed.",
        kind="scorer-failed",
        remedies=["stop the scorer, or what else it serves", "unset RAY_ADDRESS: a local Ray is started"],
    )


def replica_resources(config: ServerConfig, nodes: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """CPU cores and GPUs of a replica; `nodes`: the resources of each. Raises: UserError if no node has them."""
    gpus_there = max(node.get("GPU", 0.0) for node in nodes)
    gpus = float(gpus_there > 0) if config.gpus_per_replica == "auto" else config.gpus_per_replica
    # Those of a node that has the GPUs: the one with most cores may have none.
    cpus_there = max((node.get("CPU", 0.0) for node in nodes if node.get("GPU", 0.0) >= gpus), default=0.0)
    share = max(1.0, math.floor(cpus_there / config.max_replicas))
    cpus = share if config.cpus_per_replica == "auto" else config.cpus_per_replica
    if cpus > cpus_there or gpus > gpus_there:
        raise UserError(
            f"A replica asks for {cpus:g} CPUs and {gpus:g} GPUs, and no node has them "
            f"({max(node.get('CPU', 0.0) for node in nodes):g} CPUs, {gpus_there:g} GPUs at most).",
            kind="cluster-resources",
            remedies=["lower serve.cpus_per_replica or serve.gpus_per_replica (fractions are fine)"],
        )
    return cpus, gpus
