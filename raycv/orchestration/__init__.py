"""Ray: the cluster, a Tune trial per fold, Train workers, Data and Serve. The only room that imports ray.

Comes in: what a fold, a file or a scorer needs. Goes out: files of folds, scored chunks, a scorer that answers.
Does not belong here: what is computed. A worker calls the other rooms.
"""

import os

# Ray reads these when it is imported.
# Posts are sensitive: a tool that reads them does not talk to third parties. Set the variable yourself to differ.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's own table of trials would be printed over ours.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Ctrl-C is ours: Tune would swallow it and call the stopped trials finished.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# Tune would ask for the cluster's size every 10 s, for messages that nobody sees, and wait for one that is gone.
os.environ.setdefault("TUNE_STATE_REFRESH_PERIOD", "1e9")
# Ray Train looks at its workers that often, and a report waits for the look: 2 s are felt in short epochs.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# raycv limits how long folds wait for a node. Ray Train would fail an attempt after a minute, so it gets a week.
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "604800")
# Ray's dashboard then knows each fold as a run of Ray Train: its state, workers and nodes.
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
# A fold is half a dozen processes that mostly wait: Ray's warning of many processes for few cores does not help.
# The fold reports the death of its process or node. Ray's own line may come when the run is over, and for a node it
# brings pages of Ray's state.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "worker processes have been started on node|A worker died or was killed while"
    "|Raylet is terminated|has been marked dead because the detector",
)
