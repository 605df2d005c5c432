"""The workers that train one fold together, data-parallel. Knows torch.distributed; fold.py starts them."""

from collections.abc import Iterable

import torch
from torch import distributed


class Workers:
    """This worker's place among those of its fold; alone where torch.distributed is not initialised."""

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.size = distributed.get_world_size() if together else 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the workers, in place; every worker gets the same bits."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over the workers in one exchange: each worker had a part of the optimizer step's rows."""
        if self.size == 1:
            return
        gathered = list(parameters)
        for parameter in gathered:
            if parameter.grad is None:  # no row of the step was this worker's
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in gathered if parameter.grad is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
