"""Random numbers of a data set and its collator: they depend only on seed, epoch and rows of the batch."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, RandomSampler, get_worker_info

from peftree.train.parts import Again, Weightless


class Draws:
    """Gives each batch its own random numbers, whichever process reads it and however the run got there.

    Batches are read ahead of the steps and, after a resume, from the middle of an epoch, so numbers from the
    streams that continue through training would differ then. This covers the streams of
    `random`, `numpy.random` and torch on the CPU, but not a generator that a data set keeps for itself.

    Args:
        seed: the seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it
        self._order = torch.Generator()

    @property
    def epoch(self) -> int:
        """The epoch that batches are read for."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, number: int) -> None:
        self._epoch.fill_(number)
        self._order.manual_seed(self.seed + number)

    def order(self, sampler: Any) -> Any:
        """Return the sampler; one that draws its order from torch's stream draws it from the epoch's stream."""
        if sampler is not None and not isinstance(sampler, RandomSampler) and vars(sampler).get("generator", 0) is None:
            sampler.generator = self._order
        return sampler

    def on(self, loader: Any) -> Any:
        """Return accelerate's loader of the training rows, which draws separately for each batch from now on."""
        base = loader.base_dataloader
        kind = _Stream if isinstance(base.dataset, IterableDataset) else _Rows
        vars(base)["dataset"] = kind(base.dataset, self)  # of the same kind and length, so the loader's checks hold
        base.collate_fn = _Collate(base.collate_fn, self)
        base.generator = torch.Generator().manual_seed(
            self.seed
        )  # a loader that starts again leaves training's stream alone
        return loader

    @contextlib.contextmanager
    def of(self, *key: object) -> Iterator[None]:
        """Make what is drawn inside depend on `key`; outside, random states are not changed."""
        digest = hashlib.sha256(repr((self.seed, self.epoch, *key)).encode()).digest()
        with unmoved():
            random.seed(digest)
            np.random.seed(np.frombuffer(digest, np.uint32))
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            yield


@contextlib.contextmanager
def unmoved() -> Iterator[None]:
    """Restore the random states of `random`, `numpy.random` and torch on the CPU after what is done inside."""
    before = _now()
    try:
        yield
    finally:
        _set(before)


def _now() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()


def _set(state: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


class _Batch(list[Any]):
    """The rows of a batch, and what its collator's draws depend on."""

    key: tuple[object, ...] = ()
    weightless = False


class _Told:
    """What a wrapped data set passes on."""

    def __init__(self, rows: Any, draws: Draws) -> None:
        self.rows = rows
        self.draws = draws

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch to a data set that shuffles by it."""
        told: Callable[[int], None] | None = getattr(self.rows, "set_epoch", None)
        if told is not None:
            told(epoch)


class _Rows(_Told, Dataset[Any]):
    """A data set read batch by batch, as torch's loader asks for it."""

    def __getitem__(self, place: Any) -> Any:
        with self.draws.of("rows", place):
            return self.rows[place]

    def __getitems__(self, places: list[Any]) -> _Batch:
        together = getattr(self.rows, "__getitems__", None)
        with self.draws.of("rows", *places):
            batch = _Batch(together(places) if together else (self.rows[i] for i in places))
        batch.key = tuple(places)
        batch.weightless = isinstance(places, Again)
        return batch


class _Stream(_Told, IterableDataset[Any]):
    """A data set read from its start, also after a resume: its draws are one stream per pass and worker."""

    def __iter__(self) -> Iterator[Any]:
        with self.draws.of("stream", _worker()):
            state = _now()
        rows, end = None, object()
        while True:
            with unmoved():
                _set(state)
                rows = iter(self.rows) if rows is None else rows
                row = next(rows, end)
                state = _now()
            if row is end:
                return
            yield row


class _Collate:
    """A collator that draws as its batch does; the batches of a stream are counted."""

    def __init__(self, collate: Callable[[Any], Any], draws: Draws) -> None:
        self.collate = collate
        self.draws = draws
        self.seen = (-1, 0)

    def __call__(self, batch: Any) -> Any:
        key = batch.key if isinstance(batch, _Batch) else self._count()
        with self.draws.of("collate", *key):
            made = self.collate(batch)
        return Weightless(made) if isinstance(batch, _Batch) and batch.weightless else made

    def _count(self) -> tuple[int, int]:
        epoch, count = self.seen
        self.seen = (self.draws.epoch, count + 1 if epoch == self.draws.epoch else 0)
        return _worker(), self.seen[1]


def _worker() -> int:
    worker = get_worker_info()
    return worker.id if worker else 0
