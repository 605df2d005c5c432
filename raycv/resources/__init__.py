"""Checks that a node can train, and plans the folds: versions, raycv's source, the shared folder, cores and GPUs.

Comes in: facts about a node, from Ray and from files. Goes out: placements, and faults that name the node.
Does not belong here: Ray itself (`orchestration`), memory of a batch (`training`), the choice of a device (`common`).
"""
