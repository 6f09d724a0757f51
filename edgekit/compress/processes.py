"""One training on several processes: who am I, what is my share, what do all agree on. Knows no loss and no pass.

``torchrun`` sets ``RANK`` and ``WORLD_SIZE``; without them there is one process, and nothing here talks to anybody.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and how many there are, as ``torchrun`` says; 0 and 1 where it did not start us."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Crew:
    """This process among all that train together."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """Say whether this process reports and saves."""
        return self.rank == 0

    def device(self) -> torch.device:
        """Return this process's accelerator, or the CPU where there is none."""
        import torch

        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this process's part of a batch's sample numbers, all parts of one size."""
        return batch[self.rank :: self.size][: len(batch) // self.size]

    def mean(self, value: float) -> float:
        """Return the mean over all processes; every one gets the same."""
        import torch
        from torch import distributed

        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device())
        distributed.all_reduce(held)
        return float(held) / self.size

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """Return the module with gradients that are averaged over all processes."""
        from torch.nn.parallel import DistributedDataParallel

        if self.size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)

    def agree(self, module: torch.nn.Module) -> None:
        """Give every process the leader's parameters and statistics."""
        from torch import distributed

        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                distributed.broadcast(tensor.data, 0)


def crew() -> Crew:
    """Join the other processes where ``torchrun`` started any; they part when the program ends.

    Not sooner: a wrapped module that outlives its group frees it while it holds the interpreter's lock, and then waits
    for a thread that waits for that lock (torch 2.13, gloo).
    """
    import torch
    from torch import distributed

    rank, size = rank_and_size()
    if size > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(distributed.destroy_process_group)
    return Crew(rank, size)
