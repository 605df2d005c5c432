"""Checks that a node can train, plans the folds, and publishes what a node leaves of a fold to an object storage.

Comes in: facts about a node, from Ray and from files. Goes out: placements, and faults that name the node.
Does not belong here: Ray itself (`orchestration`), memory of a batch (`training`), the choice of a device (`common`).
"""
