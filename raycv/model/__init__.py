"""The base model and its additions: files, weights, DoRA, head, checkpoints (FR-001, FR-007).

Comes in: a name, a folder, or a hub id. Goes out: a classifier that can be trained, or a checkpoint folder.
Does not belong here: optimizers, batches, probabilities.
"""

import os

# huggingface_hub reads this when it is imported, so we set it first. A value that the user has set stays.
# Its Xet transport has retries of its own: we saw it try for 219 s to reach a port that refused the connection.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
