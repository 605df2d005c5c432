"""The settings of a scorer before it starts: its address and token, its device, its checkpoints and their files."""

import os
import secrets
import socket

from raycv.common.devices import CPU_FOR_INFERENCE, check_gpu_before_ray
from raycv.common.locations import absolute_folder, absolute_uri, runs_folder
from raycv.config.schema import ServeConfig, ServerConfig
from raycv.errors import UserError
from raycv.inference.answerer import read_criteria
from raycv.inference.choose import choose, with_fold_id
from raycv.inference.log import named_store, store_of
from raycv.model.base_model import absolute_name
from raycv.serving.connection import TOKEN_VARIABLE, checked_token
from raycv.serving.discovery import is_loopback
from raycv.serving.fingerprint import files_of, stamps_of
from raycv.serving.messages import Setup

THREADS = "OMP_NUM_THREADS"
LOOK_SECONDS = 5
"""Limit for a request to MLflow for its id of the fold."""


def setup_of(config: ServeConfig) -> Setup:
    """The setup of a scorer as `config` asks for it. Imports neither torch nor Ray.

    Raises:
        UserError: The run, its criteria, the port or the GPU cannot be used, or others could reach the address without
            a token.
    """
    limits = listening(config.serve, os.environ.get(TOKEN_VARIABLE))
    config = on_one_device(config.model_copy(update={"serve": limits}))
    config = config.model_copy(update={"base": config.base and absolute_name(config.base)})
    chosen = choose(config.run, config.fold, runs_folder(config.dir), named_store(config.tracking.uri))
    criteria_dir = absolute_folder(config.criteria_dir) if config.criteria_dir else None
    read_criteria(chosen.checkpoints[0], criteria_dir, lambda text: None)
    if config.infer.device == "auto":
        check_gpu_before_ray(CPU_FOR_INFERENCE)
    chosen = with_fold_id(chosen, LOOK_SECONDS)
    store = store_of(config.tracking.uri, chosen.tracking_uri)
    own_threads = limits.max_replicas == 1 and limits.cpus_per_replica == "auto" and THREADS not in os.environ
    return Setup(
        config=config,
        chosen=chosen,
        criteria_dir=criteria_dir,
        store=store and absolute_uri(store),
        instance=secrets.token_hex(8),
        host=socket.gethostname(),
        stamps=stamps_of(files_of(chosen.checkpoints, criteria_dir, config.base)),
        own_threads=own_threads,
    )


def on_one_device(config: ServeConfig) -> ServeConfig:
    """`config` with the CPU in both keys if one asks for it.

    Ray does not hide the GPUs from a replica that asks for none, so the device must be set too.

    Raises:
        UserError: The keys contradict each other.
    """
    gpus, on_cpu = config.serve.gpus_per_replica, config.infer.device == "cpu"
    if on_cpu and gpus not in ("auto", 0):
        what = f"infer.device=cpu computes on no GPU, and serve.gpus_per_replica={gpus:g} asks for some."
        raise UserError(what, kind="config-value", remedies=["leave one of the two out"])
    if not on_cpu and gpus != 0:
        return config
    infer = config.infer.model_copy(update={"device": "cpu"})
    return config.model_copy(
        update={"infer": infer, "serve": config.serve.model_copy(update={"gpus_per_replica": 0.0})}
    )


def listening(config: ServerConfig, token: str | None) -> ServerConfig:
    """`config` with its port and token. Raises: UserError if the port is taken, or others reach it without a token."""
    token = checked_token(config.token or token)
    if token is None and not is_loopback(config.host):
        raise UserError(
            f"serve.host={config.host}: others could reach it, and there is no token.",
            kind="config-value",
            remedies=[
                f"set the environment variable {TOKEN_VARIABLE} to one of 16 characters or more; this makes one: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'",
                "listen on this machine alone: serve.host=127.0.0.1",
            ],
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
            port = probe.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"serve.host={config.host} serve.port={config.port}: cannot listen there ({error.strerror or error}).",
            kind="config-value",
            remedies=["take another port: serve.port=8001", "or any that is free: serve.port=0"],
        ) from error
    return config.model_copy(update={"port": port, "token": token})
