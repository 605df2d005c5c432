"""What must be equal for numbers to be comparable: the number of raycv's arithmetic, and versions."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
VERSIONS = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "scikit-learn")
"""Packages whose versions must be the same in all folds of a run, on every node and after a resume.

Weights, tokens, the order of pairs, folds and metrics come from them.
"""

NUMERICS = 1
"""The number of raycv's arithmetic. Whoever changes what training or inference computes raises it by one.

That is: the same inputs under the same versions of other packages would give other losses, weights or scores, beyond
the last digits. Runs and files of scores that another number began are not continued, since they would mix the two.
"""
FIRST_NUMERICS = 1
"""The number of what was recorded before there were numbers."""
