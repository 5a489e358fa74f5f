"""Each process's part of the batches: every n-th of them; where they do not divide, a repeated one without weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, IterableDataset

from peftree.errors import TrainError
from peftree.train.processes import Team


class Again(list[int]):
    """Places of rows that another process reads: this one reads them so that it, too, runs a pass."""


class Weightless(dict[str, Any]):
    """A batch of such rows: it has no part in the step."""


class Part(BatchSampler):
    """Batch `i` of each `size` goes to process `i`; a process that none is left for repeats the group's first.

    Args:
        batches: the batches of one process.
        team: the processes.
    """

    def __init__(self, batches: Any, team: Team) -> None:
        self.batches = batches
        self.team = team
        self.batch_size = batches.batch_size
        self.drop_last = batches.drop_last

    @property
    def sampler(self) -> Any:  # type: ignore[override]
        """The order of the rows, which is told the epoch."""
        return self.batches.sampler

    def __len__(self) -> int:
        return (len(self.batches) + self.team.size - 1) // self.team.size

    def __iter__(self) -> Iterator[list[int]]:
        group: list[list[int]] = []
        for batch in self.batches:
            group.append(batch)
            if len(group) == self.team.size:
                yield group[self.team.rank]
                group = []
        if group:
            yield group[self.team.rank] if self.team.rank < len(group) else Again(group[0])


def divide(loader: Any, team: Team) -> Any:
    """Return accelerate's loader of the training rows, which gives this process its part from now on.

    Raises:
        TrainError: the rows are a stream, which no process knows the end of.
    """
    if team.size == 1:
        return loader
    if isinstance(loader.base_dataloader.dataset, IterableDataset):
        raise TrainError(
            "A stream of rows (IterableDataset) cannot be divided among several processes.",
            "Use a data set with a length, or train in one process.",
        )
    share = loader.base_dataloader.batch_sampler  # accelerate's, which would fill up with rows that count
    share.batch_sampler = Part(share.batch_sampler, team)
    share.num_processes, share.process_index = 1, 0
    return loader
