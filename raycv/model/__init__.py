"""The base model and its additions: files, weights, DoRA, head, checkpoints (FR-001, FR-007).

Comes in: a name, a folder, or a hub id. Goes out: a classifier that can be trained, or a checkpoint folder.
Does not belong here: optimizers, batches, probabilities.
"""

import logging
import os

# huggingface_hub and transformers read these variables when they are imported, so we set them first.
# The Xet transport has retries of its own: we saw it try for 219 s to reach a port that refused the connection. A value
# that the user has set stays.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
# hf_transfer has retries of its own as well, and without that package every download would fail.
os.environ["HF_HUB_ENABLE_HF_TRANSFER"] = "0"
# transformers hides its PyTorch classes in a shell that is set up for TensorFlow.
os.environ |= {"USE_TORCH": "1", "USE_TF": "0"}
for _switch in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
    # huggingface_hub fails on import, or at each request, where these are not whole numbers of seconds.
    if not os.environ.get(_switch, "1").strip().isdecimal():
        logging.getLogger(__name__).warning(
            "%s=%s is not a whole number of seconds: its default counts", _switch, os.environ.pop(_switch)
        )
