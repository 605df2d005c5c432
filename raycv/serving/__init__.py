"""The resident scorer seen from outside: its HTTP interface, its clients, and how they find it.

Comes in: requests. Goes out: answers, refusals, and the file by which clients find the scorer.
Does not belong here: replicas and batches, which are Ray Serve's (`orchestration`).
"""
