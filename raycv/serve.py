"""`python -m raycv.serve run=...`: a resident scorer; `raycv.infer` finds it by itself."""

import ipaddress
import os
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from raycv.answers import shown_finish
from raycv.base import absolute_name, fetch_trained_base, is_folder
from raycv.checkpoint import MANIFEST, read_info
from raycv.cli import run_command
from raycv.client import TOKEN_VARIABLE, Announcement, Connection, Unavailable, checked_token, discovery_file, stamps_of
from raycv.config import ServeConfig, ServerConfig
from raycv.devices import CPU_FOR_INFERENCE, check_gpu_before_ray
from raycv.errors import UserError
from raycv.faults import Faults
from raycv.inference_log import NOT_TRACKED, store_of
from raycv.loaded import read_criteria
from raycv.paths import absolute_folder, absolute_uri, resolve, write_json
from raycv.retry import mask_secrets
from raycv.runs import choose, with_fold_id
from raycv.sources import find_criteria
from raycv.utils import ignore_stops

if TYPE_CHECKING:
    from raycv.scorer import Setup

HEALTH_ATTEMPTS = 20
WATCH_SECONDS = 5
SILENT = 2
"""Looks in a row without an answer that are told."""
LOOK_SECONDS = 5
"""For MLflow to say what it calls the fold."""


def run_server(config: ServeConfig) -> None:
    """Serves until Ctrl-C or SIGTERM, then leaves nothing behind: no process, no discovery file.

    Raises: UserError if the run, its model, the port or Ray cannot be had, or the address is open without a token.
    """
    limits = listening(config.serve, os.environ.get(TOKEN_VARIABLE))
    config = _on_one_device(config.model_copy(update={"serve": limits}))
    config = config.model_copy(update={"base": config.base and absolute_name(config.base)})
    limits = config.serve
    asked = None if config.tracking.uri == NOT_TRACKED else config.tracking.uri
    chosen = choose(config.run, config.fold, Path(config.dir), asked)
    criteria_dir = absolute_folder(config.criteria_dir) if config.criteria_dir else None
    read_criteria(chosen.checkpoints[0], criteria_dir, lambda text: None)
    if config.infer.device == "auto":
        check_gpu_before_ray(CPU_FOR_INFERENCE)
    # Here: what the user mistyped is told before Ray is imported.
    from raycv.scorer import THREADS, Setup, running

    chosen = with_fold_id(chosen, LOOK_SECONDS)
    store = store_of(config.tracking.uri, chosen.tracking_uri)
    own_threads = limits.max_replicas == 1 and limits.cpus_per_replica == "auto" and THREADS not in os.environ
    setup = Setup(
        config=config,
        chosen=chosen,
        criteria_dir=criteria_dir,
        store=store and absolute_uri(store),
        instance=secrets.token_hex(8),
        host=socket.gethostname(),
        stamps=stamps_of(files_of(chosen.checkpoints, criteria_dir, config.base)),
        own_threads=own_threads,
    )
    file = discovery_file(Path(config.dir), limits.port)
    say(f"loading run {chosen.run}, fold {chosen.fold}")
    try:
        with running(setup):
            try:
                announced = announcement(setup)
                announce(announced, file, limits)
                watch(announced)
            finally:
                ignore_stops()
                file.unlink(missing_ok=True)
                say("stopping")
    except KeyboardInterrupt:
        say("stopped")


def _on_one_device(config: ServeConfig) -> ServeConfig:
    """`config` with the CPU in both keys if one asks for it: Ray hides GPUs from no replica that asks for none.

    Raises: UserError if the keys contradict each other.
    """
    gpus, on_cpu = config.serve.gpus_per_replica, config.infer.device == "cpu"
    if on_cpu and gpus not in ("auto", 0):
        what = f"infer.device=cpu computes on no GPU, and serve.gpus_per_replica={gpus:g} asks for some."
        raise UserError(what, remedies=["leave one of the two out"])
    if not on_cpu and gpus != 0:
        return config
    infer = config.infer.model_copy(update={"device": "cpu"})
    return config.model_copy(
        update={"infer": infer, "serve": config.serve.model_copy(update={"gpus_per_replica": 0.0})}
    )


def files_of(checkpoints: Sequence[Path], criteria_dir: str | None, base: str | None) -> list[Path]:
    """The files that answers depend on; those of a base model on the hub never change, as its commit is known."""
    info = read_info(checkpoints[0])
    files = [file for folder in checkpoints for file in (folder / MANIFEST, *sorted(folder.glob("adapter_model.*")))]
    # That there are some was seen when they were read. What lies beside them may change with every answer.
    criteria = find_criteria(Path(resolve(criteria_dir or info.criteria_dir)), Faults())
    files += [criteria] if criteria else []
    if is_folder(resolve(base or info.base_model)):
        found = fetch_trained_base(info.base_model, info.base_revision, base)
        files += [found.path / name for name in found.files]
    return files


def listening(config: ServerConfig, token: str | None) -> ServerConfig:
    """`config` with its port and token settled. Raises: UserError if the port is taken, or open without a token."""
    token = checked_token(config.token or token)
    if token is None and not is_loopback(config.host):
        raise UserError(
            f"serve.host={config.host}: others could reach it, and there is no token.",
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
            remedies=["take another port: serve.port=8001", "or any that is free: serve.port=0"],
        ) from error
    return config.model_copy(update={"port": port, "token": token})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def announcement(setup: "Setup") -> Announcement:
    """What a client must know of the scorer, which is asked for its model. Raises: UserError if it does not answer."""
    config = setup.config.serve
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"
    for _ in range(HEALTH_ATTEMPTS):
        try:
            with Connection(url, config.token) as connection:
                health = connection.health()
            break
        except (Unavailable, ConnectionRefusedError):
            time.sleep(0.5)
    else:
        raise UserError(f"The scorer started, but does not answer at {url}.", remedies=["see that the port is free"])
    if health.instance != setup.instance:
        raise UserError(f"Another scorer answers at {url}.", remedies=["take another port: serve.port=0"])
    return Announcement(
        url=url,
        token=config.token,
        pid=os.getpid(),
        host=setup.host,
        instance=setup.instance,
        stamps=setup.stamps,
        tracking_uri=setup.store and mask_secrets(setup.store),
        experiment=setup.config.tracking.experiment,
        model=health.model,
    )


def announce(record: Announcement, file: Path, limits: ServerConfig) -> None:
    """Writes the discovery file, for its owner's eyes, and says where the scorer is, and who can reach it."""
    write_json(file, record.model_dump(), private=True)
    model = record.model
    finish = shown_finish(model.finished)
    say(f"run {model.named}, fold {model.fold}, {finish}, {model.base}, {model.precision}")
    say(f"listening on {record.url}  (POST /score, GET /health; the page: {record.url}/docs)")
    if not is_loopback(limits.host):
        say(f"other machines can reach it at serve.host={limits.host}, port {limits.port}")
    if limits.token:
        say("whoever asks must bring the token: Authorization: Bearer <token>")
    say(f"raycv.infer finds it by itself with dir={file.parent}; Ctrl-C (or SIGTERM) stops it")


def watch(record: Announcement, seconds: float = WATCH_SECONDS) -> NoReturn:
    """Looks every `seconds` whether the scorer answers, and says so when that changes: Ray starts again what died."""
    silent = 0
    while True:
        time.sleep(seconds)
        try:
            with Connection(record.url, record.token) as connection:
                connection.get("/health")
        except (Unavailable, ConnectionRefusedError):
            silent += 1
            # Once may be a busy moment.
            if silent == SILENT:
                say("it does not answer: busy, or a process of it died (of memory?), which Ray then starts again")
            continue
        if silent >= SILENT:
            say("it answers again")
        silent = 0


def say(text: str) -> None:
    """A line for who started the server."""
    sys.stdout.write(f"raycv.serve: {text}\n")
    sys.stdout.flush()


def main() -> None:
    run_command("serve", ServeConfig, run_server)


if __name__ == "__main__":
    main()
