"""The order of an epoch's pairs, and the weight of each class."""

import numpy as np

from raycv.config.schema import TrainConfig
from raycv.prompts.encoder import EncodedPairs


def class_weights(config: TrainConfig, labels: np.ndarray) -> np.ndarray:
    """Returns the weight of each class in the loss, float32 [2], from the labels [n] of the training pairs."""
    if config.imbalance != "weighted_loss":
        return np.ones(2, dtype=np.float32)
    # As with sklearn's "balanced", the mean weight over the training fold is 1, so losses keep their scale.
    return (len(labels) / (2 * np.bincount(labels, minlength=2))).astype(np.float32)


def epoch_order(config: TrainConfig, encoded: EncodedPairs, pairs: np.ndarray, epoch: int) -> np.ndarray:
    """Returns the training `pairs` [n] of one epoch in their order; `weighted_sampling` draws with replacement.

    The order depends only on the seed and the epoch, so a restart finds it again.
    """
    generator = np.random.default_rng([config.seed, epoch])
    if config.batching == "post_grouped":
        posts = encoded.post_of_pair[pairs]
        place = generator.permutation(posts.max() + 1)
        return pairs[np.argsort(place[posts], kind="stable")]
    if config.imbalance != "weighted_sampling":
        return generator.permutation(pairs)
    labels = encoded.labels[pairs]
    chance = (1 / np.bincount(labels, minlength=2))[labels] / 2
    return generator.choice(pairs, size=len(pairs), replace=True, p=chance)
