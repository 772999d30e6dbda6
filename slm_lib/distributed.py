"""Several processes that train one model together, each on its rows of the one batch: PyTorch's, in five words."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Ranks:
    """The processes of a run: this one is number `rank` of `count`; 0 of 1 where torch.distributed is not in use.

    >>> ranks = Ranks()
    >>> ranks.rank, ranks.count, ranks.rows(torch.arange(4)), ranks.any(True)
    (0, 1, tensor([0, 1, 2, 3]), True)
    """

    def __init__(self):
        joined = dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)

    def join(self, model: nn.Module) -> nn.Module:
        """The model, made to average its gradients over all processes in each backward pass."""
        return DistributedDataParallel(model) if self.count > 1 else model

    def rows(self, batch: Tensor) -> Tensor:
        """This process's share (B / count, ...) of a batch (B, ...) that every process has drawn."""
        return batch.chunk(self.count)[self.rank]

    def apart(self, model: nn.Module) -> AbstractContextManager:
        """Within it, what `join` returned keeps its gradients to itself: for all pieces of a batch but the last."""
        return model.no_sync() if self.count > 1 else nullcontext()

    def mean(self, value: Tensor) -> float:
        """The mean of a number, a tensor without axes, over all processes, each of which must ask."""
        if self.count > 1:
            dist.all_reduce(value)
        return value.item() / self.count

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether any process says yes; each must ask."""
        return self.mean(torch.tensor(float(flag), device=device)) > 0
