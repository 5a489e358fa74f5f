"""Mixed batches: the low-rank terms of rows with different adapters, added to one frozen product of all rows.

At a linear map each row's change is `s (x Aᵀ) B` with its own A and B. There are two forms, and the shape chooses:

* by blocks: neighbouring rows with the same adapters are a block; A `[blocks, r, in]` and B `[blocks, r, out]` are
  multiplied block by block. Smaller ranks are filled up with zeros.
* masked: A and B of all adapters one below the other, `[ranks, in]` and `[ranks, out]`; in the thin product between
  the two, what belongs to other rows' adapters is set to zero.

The stacks are held as long as the route is, and made again if a tensor, or what else a term is made of, has changed.
"""

from __future__ import annotations

import math
from itertools import groupby
from operator import attrgetter, getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils.import_utils import is_tracing

from peftree.deltas.lowrank import LowRank
from peftree.deltas.verbs import finite
from peftree.graft.program import Group, Program, Route
from peftree.sites import Site

_VERSION = attrgetter("_version")


class Stack(NamedTuple):
    """Factors in one of the forms.

    Attributes:
        A: `[blocks, r, in]`, or masked `[ranks, in]`.
        B: `[blocks, r, out]`, or masked `[ranks, out]`; times the scale.
        foreign: `[blocks, 1, ranks]`, True for columns of other blocks' adapters; None if there are none.
    """

    A: Tensor
    B: Tensor
    foreign: Tensor | None = None


class Mixed:
    """What the rows of one route get at one module.

    Attributes:
        programs: the program of each group of rows.
        empty, after: whether all programs are.
        rows: the rows that are served together, if others are not.
        low: the groups of these rows, by number: each has low-rank terms or nothing.
    """

    def __init__(self, programs: list[Program], route: Route) -> None:
        self.programs = programs
        self.first = route.groups[0].names
        self.empty, self.after = all(p.empty for p in programs), all(p.after for p in programs)
        self.rows: Group | None = None
        self.low: list[int] = []
        self._surveyed, self.like = False, (torch.float32, torch.device("cpu"))
        self._forget()

    def _forget(self) -> None:
        self.stacks: dict[bool, Stack] = {}
        self.ranks: list[int] = []
        self.watched: tuple[Any, ...] = ()

    @staticmethod
    def of(route: Route, hub: Any) -> Mixed:
        """Return what the rows of `route` get at `hub`; what is held is checked once in a run of the model."""
        if torch.compiler.is_compiling():
            return Mixed([hub.program(g.names) for g in route.groups], route)
        run = hub.shared.run
        number = None if run.choice is None else run.number
        if number is None or route.checked != number:
            route.checked = number
            for each in [hub] if number is None else [*route.mixed]:
                if each in route.mixed and not route.mixed[each].check(each):
                    del route.mixed[each]  # the module may be without adapters now
        mixed: Mixed | None = route.mixed.get(hub)
        if mixed is None or not mixed._holds(hub):
            mixed = route.mixed[hub] = Mixed([hub.program(g.names) for g in route.groups], route)
        return mixed

    def _holds(self, hub: Any) -> bool:
        """Return whether these are still the programs of `hub`, which forgets them all at once."""
        return hub.programs.get(self.first) is self.programs[0]

    def takes(self, route: Route, x: Tensor) -> bool:
        """Return whether rows of `x` may be served together now: no backward pass or trace can follow."""
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled():
            self._forget()  # a step of training may follow
            return False
        if not self._surveyed:
            self._survey(route)
        kind = x.device.type
        return (
            bool(self.low)
            and type(x) is Tensor
            and x.is_floating_point()
            and kind != "meta"
            and not torch.is_autocast_enabled(kind)
            and not torch._C._are_functorch_transforms_active()
            and torch._C._get_tracing_state() is None
            and (kind == "cpu" or not is_tracing(x))  # a graph that is captured
            and self._known(x)
        )

    def _survey(self, route: Route) -> None:
        """Find which groups can be served together, and the blocks of their rows."""
        self._surveyed = True
        self.terms = [_terms(p) for p in self.programs]
        self.low = [i for i, t in enumerate(self.terms) if t is not None] if any(self.terms) else []
        self.deltas = [d for i in self.low for _, d in self.terms[i] or ()]
        owners = [group for group in route.owners if group in self.low]
        if len(owners) < route.size:
            own = [row for row, group in enumerate(route.owners) if group in self.low]
            self.rows = Group((), torch.tensor(own, device=route.groups[0].rows.device))
        runs = [len([*run]) for _, run in groupby(owners)]
        self.blocks = owners[:: math.gcd(*runs) or 1]

    def add(self, x: Tensor, y: Tensor) -> Tensor | None:
        """Add the terms to the frozen map's fresh output `y` `[rows, .., out]` of `x`; None if its dtype is another."""
        if y.dtype != x.dtype:
            return None
        y, count = y.contiguous(), len(self.blocks)
        tokens = y.numel() // (y.shape[-1] * count)
        A, B, foreign = self._stack(tokens, x, y.shape[-1])
        if A.dim() == 3:
            thin = torch.bmm(A, x.reshape(count, tokens, x.shape[-1]).mT)
            y.view(count, tokens, y.shape[-1]).baddbmm_(thin.mT, B)
            return y
        thin = functional.linear(x, A).reshape(count, tokens, len(A))
        if foreign is not None:
            thin.masked_fill_(foreign, 0.0)
        y.view(-1, y.shape[-1]).addmm_(thin.flatten(0, 1), B)
        return y

    def check(self, hub: Any) -> bool:
        """Drop the stacks if what they were made from has changed; return whether the programs are still those."""
        if not self._holds(hub):
            return False
        if not self.watched:
            return True
        held, names, state, before, facts = self.watched
        changes = LowRank.changes[0]
        try:
            same = _state(list(map(getitem, held, names))) == state
        except (AttributeError, KeyError, RuntimeError, TypeError):  # one is gone, or counts its changes no longer
            same = False
        if same and before != changes:
            self.watched = (held, names, state, changes, facts)
            same = all(map(is_, facts, _facts(self.deltas)))
        if not same:
            self._forget()
        return True

    def _known(self, x: Tensor) -> bool:
        """Return whether stacks for `x` may be made or used: False if terms are not plain now or hide their changes."""
        if self.like != (x.dtype, x.device):
            self._forget()
            self.like = (x.dtype, x.device)
        if self.watched:
            return True
        changes, facts = LowRank.changes[0], _facts(self.deltas)
        every = [kept for d in self.deltas for m in d.modules() for kept in (m._parameters, m._buffers)]
        places = [(kept, name) for kept in every for name, t in kept.items() if t is not None]
        tensors: list[Any] = [kept[name] for kept, name in places]
        counted = all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in tensors)
        if not counted or any(d.training or not d.plain for d in self.deltas):
            return False
        held, names = map(list, zip(*places, strict=True))
        self.watched = (held, names, _state(tensors), changes, facts)
        return True

    def _stack(self, tokens: int, x: Tensor, out: int) -> Stack:
        """Return the stack of the form that suits blocks of `tokens`; make it the first time."""
        if self.ranks and (found := self.stacks.get(self._few(tokens))):
            return found
        pairs = [self._pair(self.terms[i] or [], x, out) for i in self.low]
        self.ranks = [len(A) for A, _ in pairs]
        few, at = self._few(tokens), [self.low.index(group) for group in self.blocks]
        if few and finite([B for _, B in pairs]):  # zero times an infinity of another row's adapter is not zero
            own = torch.repeat_interleave(torch.tensor(self.ranks))
            foreign = (own != torch.tensor(at)[:, None, None]).to(x.device)
            A, B = (torch.cat(factors) for factors in zip(*pairs, strict=True))
            stack = Stack(A, B, foreign if foreign.any() else None)
        elif len(set(self.ranks)) == 1:
            stack = Stack(*(torch.stack(factors) for factors in zip(*(pairs[group] for group in at), strict=True)))
        else:
            A, B = (x.new_zeros(len(at), max(self.ranks), width) for width in (x.shape[-1], out))
            for block, group in enumerate(at):
                for whole, factor in zip((A, B), pairs[group], strict=True):
                    whole[block, : len(factor)] = factor
            stack = Stack(A, B)
        self.stacks[few] = stack
        return stack

    def _few(self, tokens: int) -> bool:
        """Return whether the ranks are few enough for the masked form.

        Measured on CPUs: for one token, a block's factors cost as much to read as six times their columns to multiply
        masked; for many tokens, a column costs about the same in both forms.
        """
        most, every = max(self.ranks), sum(self.ranks)
        return every * tokens <= 6 * most or every <= 1.5 * most

    def _pair(self, terms: list[tuple[Site, LowRank]], x: Tensor, out: int) -> tuple[Tensor, Tensor]:
        """Return A `[ranks, in]` and B `[ranks, out]` of the sum of these terms."""
        if len(terms) == 1 and terms[0][0].rows is None:
            A, B = terms[0][1].factors()
            return A.to(x.dtype), (terms[0][1].scale * B).to(x.dtype)
        As, Bs = [x.new_zeros(0, x.shape[-1])], [x.new_zeros(0, out)]
        for site, delta in terms:
            A, B = delta.factors()
            first, last = site.rows or (0, out)
            As.append(A.to(x.dtype))
            Bs.append(functional.pad((delta.scale * B).to(x.dtype), (first, out - last)))
        return torch.cat(As), torch.cat(Bs)


def _terms(program: Program) -> list[tuple[Site, LowRank]] | None:
    """Return the terms of a program that adds nothing but low-rank ones to a linear map; None if it does more."""
    found = [(s, d) for s, d in program.reweights if isinstance(d, LowRank) and s.kind in ("linear", "conv1d")]
    only = program.quick and not program.rewrites and len(found) == len(program.reweights)
    return found if only and all(d.plain or d.training for _, d in found) else None


def _state(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Return what differs if values have changed, unless they were written through `.data` into the same memory."""
    return list(map(_VERSION, tensors)), list(map(Tensor.data_ptr, tensors))


def _facts(deltas: list[LowRank]) -> list[Any]:
    """Return the attributes of `deltas`, of which the same objects mean the same factors."""
    return [value for delta in deltas for value in vars(delta).values()]
