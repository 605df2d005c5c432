"""The loop of one fold, and all that it computes with: batches, memory, states, metrics (FR-005, FR-007).

Comes in: a classifier and token arrays. Goes out: `TrainResult`, training states, metrics.
Does not belong here: Ray, MLflow, run folders.
"""
