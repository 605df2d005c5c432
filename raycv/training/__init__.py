"""The loop of one fold and its parts: batches, memory, training states, metrics (FR-005, FR-007).

Comes in: a classifier and token arrays. Goes out: `TrainResult`, training states, metrics.
Does not belong here: Ray, MLflow, run folders.
"""
