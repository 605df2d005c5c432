"""Processes and nodes of a run that die while it trains: killed for real, and what is left is the unbroken run."""

import contextlib
import os
import re
import signal
import time

import psutil
import pytest
from support.commands import statuses
from support.interrupted_runs import amid_an_epoch, assert_like_unbroken, resume, started, wait_for
from support.refusals import said_refusal

from raycv.common.files import read_json
from raycv.results.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.ray, pytest.mark.timeout(1500)]

WORKER, TRIAL, CONTROLLER = "RayTrainWorker", "FoldTrial", "TrainController"
MEETING, BOARD = "SynchronizationActor", "ProgressBoard"
"""What Ray calls the processes of a fold: one that trains, the Tune trial, Ray Train's controller, and where the
workers meet at each report; and the run's, where workers post how far they are."""


IDLERS = "DatasetManager|PlacementGroupCleaner|AutoscalingCoordinator"
"""And those of Ray Train's that have nothing to do."""


def family(process, kinds):
    """The processes of `kinds`, a regular expression, that Ray started for the run of `process`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if re.search(kinds, "".join(child.cmdline())):
                found.append(child)
    return found


def newest(process, kind):
    """The process of `kind` that Ray started last for the run of `process`."""
    return max(family(process, kind), key=psutil.Process.create_time)


def said(folder):
    return (folder / "out").read_text()


def gone_on(folder, fold):
    """How often `fold` went on from a state."""
    return len(re.findall(f"fold {fold}: resumes after epoch", said(folder)))


def run_of(folder):
    return RunFolder(folder / "runs" / "mine")


@pytest.fixture
def second_ray():
    """Another Ray on this machine, as somebody else's: what asks for "the" cluster here then finds none."""
    import ray

    ray.init(address="local", num_cpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.core
@pytest.mark.usefixtures("second_ray")
def test_a_fold_any_of_whose_processes_is_killed_goes_on_by_itself(tmp_path, whole):
    """All in one run, each with SIGKILL in the middle of an epoch."""
    first, second = (run_of(tmp_path).fold(fold) for fold in range(2))
    with started(tmp_path) as process:
        wait_for(process, tmp_path, lambda: amid_an_epoch(first))
        idlers = family(process, IDLERS)
        assert len(idlers) == 3
        for each in (*idlers, newest(process, BOARD)):
            each.kill()
        newest(process, WORKER).kill()
        wait_for(process, tmp_path, lambda: gone_on(tmp_path, 0) == 1)
        newest(process, TRIAL).kill()
        wait_for(process, tmp_path, lambda: amid_an_epoch(second))
        newest(process, MEETING).kill()
        wait_for(process, tmp_path, lambda: gone_on(tmp_path, 1) == 1)
        newest(process, CONTROLLER).kill()
        assert process.wait(timeout=800) == 0, said(tmp_path)
    assert "fold 0: worker 0 of the fold died, or its node; the fold is tried again from its last" in said(tmp_path)
    for fold in range(2):
        assert f"fold {fold}: the process that drives the fold died; the fold is tried again" in said(tmp_path)
    assert "fold 1: worker 0 of the fold died, or its node; the fold is tried again from its last" in said(tmp_path)
    assert (gone_on(tmp_path, 0), gone_on(tmp_path, 1)) == (2, 2)
    assert "Traceback" not in said(tmp_path)
    assert "unexpected system error" not in said(tmp_path)
    assert [len(read_json(fold.result)["restarts"]) for fold in (first, second)] == [2, 2]
    assert read_json(first.result)["restarts"][0] == "worker 0 of the fold died, or its node"
    assert_like_unbroken(tmp_path, whole)


@pytest.mark.parametrize("retries", [0, 2])
def test_a_trial_that_dies_when_its_fold_is_done_costs_nothing(tmp_path, whole, retries):
    """It dies while it removes the training states, beside which many files lie here."""
    run = run_of(tmp_path)
    with started(tmp_path, f"resources.retries={retries}") as process:
        wait_for(process, tmp_path, lambda: amid_an_epoch(run.fold(0)))
        # Now, since a look at all processes may take as long as the removal.
        trial = newest(process, TRIAL)
        for number in range(50_000):
            (run.fold(0).state / f"many-{number}").touch()
        wait_for(process, tmp_path, run.fold(0).result.is_file)
        trial.kill()
        assert run.fold(0).state.exists(), "the trial was done"
        assert process.wait(timeout=300) == 0, said(tmp_path)
    assert not run.fold(0).state.exists()
    assert [word for word in ("tried again", "failed", "damaged", "resumes after") if word in said(tmp_path)] == []
    assert statuses(tmp_path) == {"mine": "FINISHED", "fold_0": "FINISHED", "fold_1": "FINISHED"}
    assert_like_unbroken(tmp_path, whole)


@pytest.mark.parametrize("kind", ["/gcs_server$", pytest.param("/raylet$", marks=pytest.mark.core)])
def test_a_cluster_that_is_gone_ends_the_run_with_what_to_type(tmp_path, whole, kind):
    with started(tmp_path) as process:
        wait_for(process, tmp_path, lambda: amid_an_epoch(run_of(tmp_path).fold(0)))
        its = psutil.Process(process.pid).children(recursive=True)
        next(each for each in its if re.search(kind, each.cmdline()[0])).kill()
        assert process.wait(timeout=120) == 1, said(tmp_path)
    _, alive = psutil.wait_procs(its, timeout=60)
    assert [each.name() for each in alive] == []
    parts = ("Run mine failed: the Ray cluster at ", "python -m raycv.run resume=mine\n")
    said_refusal(said(tmp_path), "cluster-unreachable", *parts)
    assert "Traceback" not in said(tmp_path)
    left = statuses(tmp_path)
    assert left.pop("mine") == "FAILED"
    # Fold 0 may end before the loss of the cluster is noticed.
    finished = left["fold_0"] == "FINISHED"
    assert finished or left == {"fold_0": "FAILED"}
    kept = "1 finished fold of 2 kept" if finished else "fold 0: resumes after epoch"
    assert kept in resume(tmp_path, "resume=latest")
    assert_like_unbroken(tmp_path, whole)


def test_processes_that_die_as_the_workers_start_cost_retries_and_no_place(tmp_path):
    """The trial as soon as its worker is there, then the next worker as it is set up, then the controller of a third.

    There is one place.
    """
    with started(tmp_path, f"resources.cpus_per_fold={os.cpu_count()}", "resources.retries=3") as process:
        wait_for(process, tmp_path, lambda: family(process, WORKER))
        newest(process, TRIAL).kill()
        wait_for(process, tmp_path, lambda: "the process that drives the fold died; the fold is" in said(tmp_path))
        wait_for(process, tmp_path, lambda: family(process, f"{WORKER}.init_train_context"))
        newest(process, WORKER).kill()
        again = "fold 0: a worker of the fold died as it started, or its node; the fold is tried again"
        wait_for(process, tmp_path, lambda: again in said(tmp_path))
        wait_for(process, tmp_path, lambda: family(process, f"{WORKER}.init_train_context"))
        newest(process, CONTROLLER).kill()
        assert process.wait(timeout=300) == 0, said(tmp_path)
    assert said(tmp_path).count("is tried again") == 3
    assert run_of(tmp_path).report.is_file()


def test_without_more_retries_the_fold_fails_alone_and_the_message_says_what_to_type(tmp_path, whole):
    """The one that it has is spent when its trial dies; the worker of the next trial dies too."""
    run = run_of(tmp_path)
    with started(tmp_path, "resources.retries=1") as process:
        wait_for(process, tmp_path, lambda: amid_an_epoch(run.fold(0)))
        newest(process, TRIAL).kill()
        wait_for(process, tmp_path, lambda: gone_on(tmp_path, 0) == 1)
        newest(process, WORKER).kill()
        assert process.wait(timeout=800) == 1, said(tmp_path)
    assert "fold 0: worker 0 of the fold died, or its node, and resources.retries=1: it was trained 2" in said(tmp_path)
    advice = "then train the missing folds alone, with the same settings: python -m raycv.run resume=mine\n"
    assert advice in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert not run.report.exists()
    assert statuses(tmp_path) == {"mine": "FAILED", "fold_0": "FAILED", "fold_1": "FINISHED"}
    assert "fold 0: resumes after epoch" in resume(tmp_path, "resume=latest")
    assert_like_unbroken(tmp_path, whole)


def test_the_place_of_a_trial_that_died_for_good_is_the_next_folds(tmp_path):
    """There is one place, all of the machine, and Ray would keep it for the dead one until the run ends."""
    run = run_of(tmp_path)
    with started(tmp_path, "resources.retries=0", f"resources.cpus_per_fold={os.cpu_count()}") as process:
        wait_for(process, tmp_path, lambda: family(process, WORKER))
        newest(process, TRIAL).kill()
        assert process.wait(timeout=150) == 1, said(tmp_path)
    assert not run.fold(0).result.exists()
    once = "fold 0: the process that drives the fold died, and resources.retries=0: it was trained 1 time in all."
    assert once in said(tmp_path)
    assert "fold 1: done" in said(tmp_path)
    assert run.fold(1).result.is_file()


@pytest.mark.parametrize("pause", [0.05, 1.0])
def test_a_second_ctrl_c_breaks_nothing_off(tmp_path, pause):
    with started(tmp_path) as process:
        wait_for(process, tmp_path, lambda: amid_an_epoch(run_of(tmp_path).fold(0)))
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 130, said(tmp_path)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert [each.name() for each in alive] == []
    assert "Resume it: python -m raycv.run resume=mine" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert statuses(tmp_path) == {"mine": "KILLED", "fold_0": "KILLED"}


@pytest.mark.core
def test_a_lost_node_and_one_that_is_to_be_taken_away_cost_no_fold(tmp_path, whole, monkeypatch):
    """One of two nodes dies unannounced; its fold goes on at a third, which then gets a spot machine's notice."""
    # For all that the nodes start: a fast machine ends the fold within the 5 s between two looks of Ray Train.
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.2")
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated import autoscaler_pb2

    seen_soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": seen_soon})
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    run = run_of(tmp_path)
    try:
        made.add_node(**node)
        lost = made.add_node(**node)
        made.wait_for_nodes()
        cluster = {"RAY_ADDRESS": made.address, "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
        with started(tmp_path, "cv.max_concurrent=2", "resources.retries=1", **cluster) as process:
            wait_for(process, tmp_path, lambda: all(amid_an_epoch(run.fold(fold)) for fold in range(2)))
            made.remove_node(lost, allow_graceful=False)
            spot = made.add_node(**node)
            wait_for(process, tmp_path, lambda: gone_on(tmp_path, 0) + gone_on(tmp_path, 1) == 1)
            reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            # Short, so that the fold is not done before the machine is gone.
            deadline = int(time.time() * 1000) + 1000
            assert GcsClient(address=made.address).drain_node(spot.node_id, reason, "spot", deadline)[0]
            made.add_node(**node)
            # By itself, while the machine is still there.
            wait_for(process, tmp_path, lambda: gone_on(tmp_path, 0) + gone_on(tmp_path, 1) == 2)
            made.remove_node(spot, allow_graceful=False)
            assert process.wait(timeout=800) == 0, said(tmp_path)
    finally:
        made.shutdown()
    # Once from the lost node, once from the one with the notice.
    assert sorted([gone_on(tmp_path, 0), gone_on(tmp_path, 1)]) == [0, 2], said(tmp_path)
    # The one retry is spent on the first: the notice costs none.
    assert "worker 0 of the fold died, or its node; the fold is tried again" in said(tmp_path)
    assert said(tmp_path).count("is tried again") == 1
    assert sorted(len(read_json(run.fold(fold).result)["restarts"]) for fold in range(2)) == [0, 2]
    # Ray prints pages about a node that dies.
    assert "(raylet" not in said(tmp_path)
    assert_like_unbroken(tmp_path, whole)
