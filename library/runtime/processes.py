"""Collective operations between the processes of a run, over the CPU and without a time limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process, and how many there are. With one, nothing waits and nothing is sent."""

    rank: int = 0
    world: int = 1

    def shard(self, work: Sequence[Any]) -> Sequence[Any]:
        """This process's part of work that every process lists in the same order."""
        return work[self.rank :: self.world]

    def barrier(self) -> None:
        """Return once every process has called it."""
        if self.world > 1:
            import torch

            torch.distributed.barrier(_patient_group())

    def close(self) -> None:
        """End the process groups after a barrier: a process that exits early can bring down those that wait for it."""
        if self.world > 1:
            import torch

            self.barrier()
            torch.distributed.destroy_process_group()
            _patient_group.cache_clear()

    def all_max(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.world == 1:
            return value
        import torch

        vote = torch.tensor(value)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX, group=_patient_group())
        return int(vote)

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any process has set it; every process gives as many."""
        if self.world == 1:
            return list(flags)
        import torch

        votes = torch.tensor(flags, dtype=torch.uint8)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=_patient_group())
        return votes.bool().tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks; each process waits for the last one. Values are pickled."""
        if self.world == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=_patient_group())
        return values

    def broadcast_all(
        self, own: Sequence[Tensor], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> Iterator[list[Tensor]]:
        """The float32 tensors of every process: one list per process, in the order of ranks.

        Args:
            own: those of this process, on the CPU.
            shapes: the shapes of each process's tensors, by rank.
        """
        if self.world == 1:
            yield list(own)
            return
        import torch

        for rank, theirs in enumerate(shapes):
            received = []
            for number, shape in enumerate(theirs):
                tensor = own[number].contiguous() if rank == self.rank else torch.empty(shape)
                torch.distributed.broadcast(tensor, src=rank, group=_patient_group())
                received.append(tensor)
            yield received


@lru_cache(maxsize=1)
def _patient_group() -> Any:
    """All processes, over the CPU. Groups for training give up after minutes, but caching a data set takes hours."""
    import torch

    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))
