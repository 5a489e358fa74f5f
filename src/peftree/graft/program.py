"""A program: the deltas that act on one module, sorted by verb, for one choice of active adapters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftree.deltas.lowrank import LowRank
from peftree.deltas.scene import entered, scene
from peftree.deltas.verbs import Attend, Delta, Prepend, Reweight, Rewrite, Side
from peftree.errors import AdapterError
from peftree.sites import Site


@dataclass
class Program:
    """The deltas of one module in the order in which they apply: weights first, then outputs.

    Attributes:
        reweights, rewrites, attends, prepends, sides: the deltas with their sites, by verb.
        quick: whether every reweight has a form that never builds the weight, and may use it together with the others.
        fused: the reweights, if they have one fast form on a linear map: one delta, or low-rank terms; else empty.
    """

    reweights: list[tuple[Site, Reweight]] = field(default_factory=list)
    rewrites: list[tuple[Site, Rewrite]] = field(default_factory=list)
    attends: list[tuple[Site, Attend]] = field(default_factory=list)
    prepends: list[tuple[Site, Prepend]] = field(default_factory=list)
    sides: list[tuple[Site, Side]] = field(default_factory=list)
    quick: bool = True
    fused: list[Reweight] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """True if the frozen module runs unchanged."""
        return not (self.reweights or self.rewrites)

    @property
    def after(self) -> bool:
        """True if the frozen module runs unchanged, though its input and output may be changed."""
        return not self.reweights

    @property
    def memory_length(self) -> int:
        """Slots by which shared-softmax memories move the positions of real tokens."""
        return sum(d.length for _, d in self.attends if d.shift)

    @property
    def token_length(self) -> int:
        """Number of virtual tokens that enter."""
        return sum(d.length for _, d in self.prepends)


def compile_program(deltas: Iterable[tuple[Site, Delta]]) -> Program:
    """Sort `deltas` by verb and decide which path they may take."""
    every = list(deltas)
    sorted_by_verb: Any = [
        [e for e in every if isinstance(e[1], v)] for v in (Reweight, Rewrite, Attend, Prepend, Side)
    ]
    program = Program(*sorted_by_verb)
    first = True
    for site, delta in program.reweights:
        alone = first or not delta.reads_weight
        whole = site.rows is None or type(delta).input is Reweight.input
        program.quick = program.quick and delta.quick and alone and whole
        first = False
    if program.quick and all(s.kind in ("linear", "conv1d") and s.rows is None for s, _ in program.reweights):
        found = [d for _, d in program.reweights if type(d).fused is not Reweight.fused]
        same = len(found) == 1 or all(isinstance(d, LowRank) for d in found)
        program.fused = found if same and len(found) == len(program.reweights) else []
    return program


@dataclass(frozen=True)
class Group:
    """Rows of a batch that one program serves.

    Attributes:
        names: the active adapters of these rows, in order; empty for the base model.
        rows: their indices, int64.
    """

    names: tuple[str, ...]
    rows: Tensor


@dataclass
class Route:
    """One adapter (or stack of adapters) per row of the batch.

    Attributes:
        groups: a partition of the rows.
        size: number of rows.
        mixed: by hub, what is held while rows are routed so (`graft.mixed`).
        checked: the number of the last run in which it was compared with what it was made from.
    """

    groups: list[Group]
    size: int
    mixed: dict[Any, Any] = field(default_factory=dict, repr=False)
    checked: int | None = None

    @functools.cached_property
    def owners(self) -> list[int]:
        """The number of each row's group."""
        found = {row: number for number, group in enumerate(self.groups) for row in group.rows.tolist()}
        return [found[row] for row in range(self.size)]

    def expand(self, group: Group, n: int) -> Tensor:
        """Return the rows of `group` in a tensor whose first dimension `n` is a multiple of the batch."""
        if n % self.size:
            raise AdapterError(
                f"A module that an adapter changes got {n} rows, but {self.size} rows are routed.",
                "Name one adapter per row; a part that is computed once for the whole batch (T5's position bias) "
                "cannot differ by row.",
            )
        times = n // self.size
        rows = group.rows
        if times == 1:
            return rows
        return (rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()


def of_rows(value: Any, n: int, rows: Tensor) -> Any:
    """Return the `rows` of a tensor that has `n`; return anything else unchanged."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == n:
        return value[rows]
    return value


def spread(value: Any, n: int) -> Any:
    """Return a tensor of one row as one of `n`; return anything else unchanged.

    Raises:
        AdapterError: it is a table of more than two dimensions, from which the model makes one value for all rows.
    """
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1:
        if value.dim() > 3:
            raise AdapterError(
                f"A module takes one table {list(value.shape)} for a batch of {n} rows; rows cannot be routed there.",
                "Switch adapters for the whole batch, or adapt other modules.",
            )
        return value.expand(n, *value.shape[1:])
    return value


def swapped(x: Tensor, size: int) -> bool:
    """Return whether `size` rows may be the second dimension of `x`, or be spread over its first."""
    return len(x) != size if x.dim() == 2 else x.dim() == 3 and x.shape[1] == size


@contextlib.contextmanager
def narrowed(route: Route, group: Group) -> Iterator[None]:
    """Show the deltas inside the scene of one group's rows."""
    whole = scene()
    number = next(i for i, g in enumerate(route.groups) if g is group)
    first = whole.shape or (None if whole.task is None else whole.task.shape)
    with entered(whole if first is None else whole.of(route.expand(group, first[0]), number)):
        yield
