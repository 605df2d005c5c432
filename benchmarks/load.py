"""The resident scorer under load, on loopback: one client and 64, its memory, nine criteria at once and one by one.

A scorer of its own on a run of its own, both in processes as a user starts them. Every client is a thread with one
kept connection that asks for one pair at a time, each a post of its own, and has it logged to MLflow (SQLite).
Memory is that of all processes of the server: replica, proxy, controller and what else Ray runs.
"""

import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Bar, Result, parser, spread
from benchmarks.serving import add_given, run_of, scorer_of
from raycv.common.files import read_json
from raycv.serving.connection import Connection, Unavailable
from raycv.serving.discovery import PATTERN

CLIENTS = 64
STORE = "inference.db"
"""MLflow's, in the folder of the runs' folder"""
GROWTH_LIMIT = 0.05
"""Of resident memory, from after the first seconds of load to its end: what an allocator's pools move by themselves."""
CRITERION = "A.4"


def load(url: str, clients: int, seconds: float) -> tuple[Counter[int], float]:
    """Answers by status, and seconds, of `clients` that ask without pause."""
    statuses: list[Counter[int]] = [Counter() for _ in range(clients)]
    begun = time.perf_counter()
    ends = begun + seconds

    def client(number: int) -> None:
        with Connection(url, None) as connection:
            while time.perf_counter() < ends:
                post = f"Client {number} lies awake until four, night {statuses[number].total()}."
                try:
                    status, _ = connection.send("POST", "/score", {"post": post, "criterion": CRITERION, "log": True})
                except (Unavailable, OSError):
                    status = 0
                statuses[number][status] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(statuses, Counter()), time.perf_counter() - begun


def nine(url: str, repeats: int) -> dict[str, list[float]]:
    """Seconds for a post's nine criteria: in one request, and in nine, in turns."""
    seconds: dict[str, list[float]] = {"one request": [], "nine requests": []}
    with Connection(url, None) as connection:
        for repeat in range(repeats + 1):
            post = f"I lie awake until four and cannot eat, for {repeat} weeks now."
            begun = time.perf_counter()
            connection.post("/score", {"post": post})
            middle = time.perf_counter()
            for number in range(1, 10):
                connection.post("/score", {"post": post + " So.", "criterion": f"A.{number}"})
            if repeat:  # the first is a warm-up
                seconds["one request"].append(middle - begun)
                seconds["nine requests"].append(time.perf_counter() - middle)
    return seconds


def server_bytes(pid: int) -> int:
    """Memory of the server and of all processes that it started; what several share is shared out among them."""
    server = psutil.Process(pid)
    total = 0
    for process in (server, *server.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def logged(store: Path) -> int:
    """Answers that MLflow has."""
    with closing(sqlite3.connect(store)) as database:
        return int(database.execute("select count(*) from runs").fetchone()[0])


def main() -> None:
    arguments = parser(__doc__, repeats=30)
    add_given(arguments)
    options = arguments.parse_args()
    clients, short, long = (8, 1.0, 2.0) if options.small else (CLIENTS, 10.0, 60.0)
    result = Result("load", options, clients=clients, seconds=long)
    with run_of(options) as (folder, run):
        store = folder / STORE
        with scorer_of(options, folder, run, f"tracking.uri=sqlite:///{store}") as url:
            (announcement,) = (folder / "runs").glob(PATTERN)
            pid = int(read_json(announcement)["pid"])
            pairs = nine(url, options.repeats)
            one, one_seconds = load(url, 1, short)
            warm, _ = load(url, clients, short)  # fills pools and queues: growth is counted from here
            before = server_bytes(pid)
            many, many_seconds = load(url, clients, long)
            growth = server_bytes(pid) / before - 1
            # Records wait, for the writer gives way to answers; at most so many: memory stays bounded.
            answers, kept = one[200] + warm[200] + many[200], logged(store)
    rows: list[dict[str, Any]] = [
        {"clients": number, "answers": counts[200], "refused_503": counts[503], "per_second": counts[200] / seconds}
        | {"errors": counts.total() - counts[200] - counts[503]}
        for number, counts, seconds in ((1, one, one_seconds), (clients, many, many_seconds))
    ]
    asked = [{"way": way, "seconds": spread(values)} for way, values in pairs.items()]
    first, second = rows
    times = asked[1]["seconds"]["median"] / asked[0]["seconds"]["median"]  # type: ignore[index]
    bars = [
        Bar("errors other than 503", first["errors"] + second["errors"], 0, at_most=True),
        Bar("growth of resident memory under load", growth, GROWTH_LIMIT, at_most=True),
        Bar(
            f"times the answers per second of one client, {clients} clients",
            second["per_second"] / first["per_second"],
            2,
        ),
        Bar("times the pairs per second, nine criteria in one request", times, 3),
    ]
    result.add(*rows, *asked, bars=bars, server_bytes=before, logging={"asked": answers, "in_mlflow": kept})
    result.report()


if __name__ == "__main__":
    main()
