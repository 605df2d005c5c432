"""The base model and its additions: files, weights, DoRA, head, checkpoints (FR-001, FR-007).

Comes in: a name, a folder, or a hub id. Goes out: a classifier that can be trained, or a checkpoint folder.
Does not belong here: optimizers, batches, probabilities.
"""
