"""The inside of a gated feed-forward network, `act(gate(x)) up(x)`: kept without the activation, or not at all.

`gated` keeps gate and up. `again` keeps what makes `x`, and runs both maps once more in the backward pass: it is left
to a caller who knows that they compute the same then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from peftree.deltas.fused import same_memory, uncast
from peftree.deltas.rebuild import Recipe, Remade, Tensors, recipe

Map = Callable[[Tensor], Tensor]
_STATE = 5056  # bytes of the state of torch's stream of random numbers on the CPU


def _product(g: Tensor, u: Tensor, act: Map) -> Tensor:
    """Return `act(g) u`, in place where nothing else needs the activation."""
    a = act(g)
    fresh = not torch.is_grad_enabled() and a.dtype == u.dtype and a.shape == u.shape and not same_memory(a, [g])
    return a.mul_(u) if fresh else a * u


class _Gated(Remade):
    """`z = act(g) u`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, act: Map) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(g, u)
        return _product(g, u, act)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.saved_tensors
        (gz,) = grads
        with uncast(gz):
            if torch.is_grad_enabled():
                g, u = (t if t.requires_grad else t.detach().requires_grad_() for t in (g, u))
                return *torch.autograd.grad(ctx.act(g) * u, (g, u), gz, create_graph=True, allow_unused=True), None
            with torch.enable_grad():
                leaf = g.detach().requires_grad_()
                a = ctx.act(leaf)
            gg = torch.autograd.grad(a, leaf, gz * u)[0] if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[1]:
                return gg, None, None
            return gg, gz * a.detach() if same_memory(a, [g]) else a.detach().mul_(gz), None

    @staticmethod
    def recipe(node: Any) -> Recipe:
        """Return the way back to `z`."""
        act = node.act
        return Recipe(list(node.saved_tensors), lambda tensors: _product(tensors[0], tensors[1], act))


def gated(g: Tensor, u: Tensor, act: Map) -> Tensor:
    """Return `act(g) u` for `g` and `u` `[.., f]`; `act` computes the same whenever it is called."""
    if g.dtype != u.dtype or not torch.is_grad_enabled() or not (g.requires_grad or u.requires_grad):
        return _product(g, u, act)
    z: Tensor = _Gated.apply(g, u, act)  # type: ignore[no-untyped-call]
    return z


class _Inner:
    """A part of the network that can be run again, as it ran at first.

    Attributes:
        run: the part; made: the way back to its input, if that is not kept itself; kept: what is, until it is saved.
        cast: autocast as it was; state: torch's stream of random numbers as it was, if the part draws any.
        graph: input of the last time that it ran again, and the edge of the graph at the output.
    """

    def __init__(self, run: Map, x: Tensor, draws: bool) -> None:
        kind = x.device.type
        self.run, self.made = run, recipe(x)
        self.kept = [x] if self.made is None else self.made.kept
        self.cast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self.state = _stream(x) if draws else None
        self.graph: tuple[Tensor, Any] | None = None

    def again(self, kept: Tensors) -> Tensor:
        """Run the part with a graph, and hold that."""
        x = (kept[0] if self.made is None else self.made.remake(kept)).detach().requires_grad_()
        before = None if self.state is None else _stream(x)
        with torch.enable_grad(), torch.autocast(*self.cast[:2], enabled=self.cast[2]):
            _set(self.state)
            try:
                z = self.run(x)
            finally:
                _set(before)
        self.graph = x, get_gradient_edge(z)  # which does not hold the output
        return z.detach()


def _stream(x: Tensor) -> Tensor:
    """Return the state of torch's stream on the CPU; in a plan, where nothing is drawn, its bytes."""
    return x.new_empty(_STATE, dtype=torch.uint8) if isinstance(x, FakeTensor) else torch.get_rng_state()


def _set(state: Tensor | None) -> None:
    if state is not None and not isinstance(state, FakeTensor):
        torch.set_rng_state(state)


class _Again(Remade):
    """`z = inner(x)`, whose gradients come from running it again."""

    @staticmethod
    def forward(ctx: Any, inner: _Inner, x: Tensor, *parameters: Tensor) -> Tensor:
        kept, inner.kept = inner.kept, []
        ctx.inner, ctx.count = inner, len(kept)
        ctx.save_for_backward(*kept, *parameters)
        return inner.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if ctx.inner.graph is None:
            ctx.inner.again(list(kept))
        (x, edge), ctx.inner.graph = ctx.inner.graph, None
        wanted = [t for t, needed in zip((x, *parameters), ctx.needs_input_grad[1:], strict=True) if needed]
        found = iter(torch.autograd.grad(edge, wanted, grads[0], allow_unused=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])

    @staticmethod
    def recipe(node: Any) -> Recipe:
        """Return the way back to `z`: what ran for it is held for the gradients."""
        return Recipe(list(node.saved_tensors[: node.count]), node.inner.again)


def again(run: Map, x: Tensor, parameters: Sequence[Tensor], draws: bool) -> Tensor:
    """Return `run(x)` without what it keeps for the backward pass, in which it runs again.

    Args:
        run: computes the same in both passes, from `x` and from `parameters`, and nothing else.
        x: the input, on a CPU if the part draws.
        parameters: of the part; that one was changed in between is an error, as torch raises it.
        draws: whether it draws random numbers.
    """
    z: Tensor = _Again.apply(_Inner(run, x, draws), x, *parameters)  # type: ignore[no-untyped-call]
    return z


def closed(run: Map, x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Return whether the gradients of `run` reach `x` and `parameters` alone: tried on the first entries of `x`."""
    before = _stream(x)
    with torch.enable_grad():
        leaf = x.detach()[(slice(0, 1),) * (x.dim() - 1)].requires_grad_()
        waiting, seen = [run(leaf).grad_fn], set[Any]()
    _set(before)
    own = {id(t) for t in (leaf, *parameters)}
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad" and id(node.variable) not in own:
            return False
        waiting += [parent for parent, _ in node.next_functions]
    return True
