"""The workers of one fold together: sums, gathered values, logits and gradients."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import distributed


class Workers:
    """This worker's place among those of its fold. It is alone if torch.distributed is not initialised."""

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.size = distributed.get_world_size() if together else 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the workers, in place. Every worker gets the same bits."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, mine: bool, device: torch.device) -> bool:
        """Returns whether `mine` is true for at least one worker. All get the same answer."""
        if self.size == 1:
            return mine
        return bool(self.sum(torch.tensor(int(mine), device=device)) > 0)

    def gather(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Gathers a tensor of integers from each worker.

        Args:
            tensor: This worker's tensor [...].
            device: The device for the exchange.

        Returns:
            The tensors of all workers as one on the CPU, [workers, ...].
        """
        whole = torch.zeros(self.size, *tensor.shape, dtype=torch.int64, device=device)
        whole[self.rank] = tensor.to(device)
        return self.sum(whole).to("cpu", tensor.dtype)

    def join(self, mine: torch.Tensor | None, part: np.ndarray, rows: int, device: torch.device) -> torch.Tensor:
        """Joins the logits of all workers.

        Args:
            mine: This worker's logits [m, 2]; None if it had no row.
            part: The positions [m] of this worker's rows.
            rows: The number of rows of all workers.
            device: The device for the exchange.

        Returns:
            Logits [rows, 2].
        """
        if self.size == 1:
            assert mine is not None
            return mine
        whole = torch.zeros(rows, 2, device=device, dtype=torch.float32 if mine is None else mine.dtype)
        if mine is not None:
            whole[torch.from_numpy(part).to(device)] = mine
        return self.sum(whole)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over the workers in one exchange.

        Each worker had only a part of the rows of the optimizer's step.
        """
        if self.size == 1:
            return
        gathered = list(parameters)
        for parameter in gathered:
            if parameter.grad is None:  # This worker had no row of the step.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in gathered if parameter.grad is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
