"""The number of raycv's arithmetic, and the packages whose versions change numerical results."""

VERSIONS = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "scikit-learn")
"""Packages whose versions must be the same in all folds of a run, on every node and after a resume.

Weights, tokens, the order of pairs, folds and metrics come from them.
"""

NUMERICS = 1
"""The number of raycv's arithmetic. Raise it by one with each change to what training or inference computes.

Such a change gives other losses, weights or scores, beyond the last digits, from the same inputs and versions. A run
or a file of scores that has another number is not continued, since the result would mix both.
"""
FIRST_NUMERICS = 1
"""The number for records that were written before these numbers existed."""
