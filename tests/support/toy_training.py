"""Small trainings whose memory or progress a test controls."""

import numpy as np
import torch
from torch import nn

TRAIN = np.arange(30)


VAL = np.arange(30, 48)


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Greedy(nn.Module):
    """A model that asks the real allocator for more than any machine has when a batch is larger than `limit`.

    `after`: calls that still succeed whatever their size, so that memory runs out in the middle of a step.
    """

    def __init__(self, inner, limit, after=0):
        super().__init__()
        self.inner, self.limit, self.after, self.calls, self.seen = inner, limit, after, 0, []

    def get_base_model(self):
        return self.inner.get_base_model()

    def forward(self, input_ids, attention_mask):
        self.calls += 1
        if self.training and self.calls > self.after and len(input_ids) > self.limit:
            torch.empty(2**60)
        self.seen.append(len(input_ids))
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Tight(nn.Module):
    """A model that asks the real allocator for more than there is unless it checkpoints.

    `after`: passes that fit. `rows`: of how many rows a pass fits without; None: of none.
    """

    supports_gradient_checkpointing = True

    def __init__(self, inner, after, rows=None):
        super().__init__()
        self.inner, self.after, self.rows, self.passes = inner, after, rows, 0
        self.get_base_model = inner.get_base_model
        self.gradient_checkpointing_enable = inner.gradient_checkpointing_enable
        self.gradient_checkpointing_disable = inner.gradient_checkpointing_disable

    def forward(self, input_ids, attention_mask):
        self.passes += self.training
        heavy = self.passes > self.after if self.rows is None else self.passes > 1 and len(input_ids) > self.rows
        if self.training and heavy and not self.inner.is_gradient_checkpointing:
            torch.empty(2**60)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)
