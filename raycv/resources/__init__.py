"""What a machine has and must have: GPUs that torch can use, versions, the shared folder, room for folds.

Comes in: what Ray, drivers and files say of a node. Goes out: devices, placements, faults that name the node.
Does not belong here: Ray itself (`orchestration`), memory of a batch (`training`).
"""
