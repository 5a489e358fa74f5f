"""Random streams of several processes: one that all share, for a method's choices, and one of each, for its passes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from peftree.deltas.shared import Shared
from peftree.train.processes import Team

_SHARED = "random/shared"


class Streams:
    """What a run of several processes draws; one process draws everything from torch's own streams, as ever.

    Torch's own streams are each process's own while batches run. A second generator gives what must be the same in all:
    it begins where the streams of one process would, so that choices (an expert, a rank) are those of one process.

    Args:
        team: the processes.
        seed: the seed of the run.
    """

    def __init__(self, team: Team, seed: int) -> None:
        self.team = team
        self.seed = seed
        self.shared = torch.Generator() if team.size > 1 else None

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, which is one pass of all processes, deltas share with the others what they must."""
        if self.shared is not None:
            Shared.alike, Shared.mean = self.shared, self.team.mean
        try:
            yield
        finally:
            Shared.alike = Shared.mean = None

    def begin(self, step: int, saved: Mapping[str, Tensor]) -> None:
        """Begin both streams: where a checkpoint left them, or else afresh for this process and step.

        Args:
            step: the step that the run is at.
            saved: the random states of the checkpoint; empty for a run that begins.
        """
        if self.shared is None:
            return
        self.shared.set_state(saved.get(_SHARED, self.team.gather(torch.get_rng_state())[0]).clone())
        mine = saved.get(_own(self.team.rank)) if _SHARED in saved else None
        if mine is None:
            digest = hashlib.sha256(repr((self.seed, self.team.rank, step)).encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            return
        torch.set_rng_state(mine.clone())
        if torch.cuda.is_available() and (device := f"{_own(self.team.rank)}/cuda") in saved:
            torch.cuda.set_rng_state(saved[device].clone())

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """Inside, torch's own streams are the shared one."""
        if self.shared is None:
            yield
            return
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            if torch.cuda.is_available():
                torch.cuda.manual_seed(int(torch.randint(1 << 62, (), generator=self.shared)))
            torch.set_rng_state(self.shared.get_state())
            try:
                yield
            finally:
                self.shared.set_state(torch.get_rng_state())

    def states(self) -> dict[str, Tensor]:
        """Return all states for a checkpoint; every process calls this."""
        if self.shared is None:
            return {}
        own = {"": torch.get_rng_state()} | ({"/cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
        found = {f"{_own(r)}{kind}": s for kind, o in own.items() for r, s in enumerate(self.team.gather(o))}
        return found | {_SHARED: self.shared.get_state()}


def _own(rank: int) -> str:
    return f"random/process{rank:05}"
