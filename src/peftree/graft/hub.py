"""The hub: the child `deltas` of an adapted module, which holds deltas and runs the module with the active ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftree.deltas.fused import fusable, lowrank_linear
from peftree.deltas.place import read
from peftree.deltas.verbs import Delta, Frozen
from peftree.errors import AdapterError
from peftree.graft.program import Program, Route, compile_program
from peftree.sites import Site


class Cell:
    """One slot that carries a sub-layer's input from the module where it enters to the one where it leaves."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a broken-off forward left behind, so that copies hold no graph."""
        return {"value": None}

    def take(self) -> Tensor:
        """Return the value and forget it, so that no graph outlives the step."""
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError("a branch ran before its input was seen; the base model's layer order is unusual")
        return value


class Shared:
    """What all hubs of one model look at: which adapters are on, and the current routing of rows."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.route: Route | None = None


class Bundle(nn.Module):
    """The deltas of one adapter at one module."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Site] = {}

    def put(self, key: str, site: Site, delta: Delta) -> None:
        """Add `delta` under `key`."""
        self._modules[key] = delta
        self.sites[key] = site

    def items(self) -> Iterator[tuple[str, Site, Delta]]:
        """Yield key, site and delta in the order they were put."""
        for key, site in self.sites.items():
            yield key, site, self._modules[key]  # type: ignore[misc]


class Hub(nn.Module):
    """Holds the bundles of a module by adapter name and runs the module.

    Attributes:
        original: the module's own class.
        effective: parameters with a changed value while a dense forward runs.
        cells: slots to fill with this module's input (it opens a branch).
        sources: slot of each branch that leaves here, by (site's reads).
        outer: the stack, layer, entry or attention part of the work, if this module has one.
    """

    original: type[nn.Module]

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared
        self.effective: dict[str, Tensor | None] = {}
        self.cells: list[Cell] = []
        self.sources: dict[str, Cell] = {}
        self.outer: list[Callable[..., Any]] = []
        self.programs: dict[tuple[str, ...], Program] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a plain attribute; children are bundles, and an adapter may be called `training` or `effective`."""
        object.__setattr__(self, name, value)

    def bundle(self, adapter: str) -> Bundle:
        """Return the bundle of `adapter`, made when first asked for."""
        if adapter not in self._modules:
            self._modules[adapter] = Bundle()
        self.programs.clear()
        return self._modules[adapter]  # type: ignore[return-value]

    def drop(self, adapter: str) -> None:
        """Forget the bundle of `adapter`."""
        self._modules.pop(adapter, None)
        self.programs.clear()

    def program(self, names: tuple[str, ...]) -> Program:
        """Return the program of these adapters, compiled once."""
        found = self.programs.get(names)
        if found is None:
            bundles = [self._modules[n] for n in names if n in self._modules]
            found = compile_program((s, d) for b in bundles for _, s, d in b.items())  # type: ignore[union-attr,operator]
            if issubclass(self.original, nn.Embedding) and self.original.forward is not nn.Embedding.forward:
                found.quick = False  # its rows are scaled afterwards, or its argument is no index (Gemma 3, BART, OPT)
            self.programs[names] = found
        return found

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int = 0) -> Any:
        """Run the adapted module; `at` counts the outer parts that have had their turn."""
        if at < len(self.outer):
            return self.outer[at](self, module, args, kwargs, at + 1)
        if self.cells:
            value = args[0] if args else next(iter(kwargs.values()))
            for cell in self.cells:
                cell.value = value
        route = self.shared.route
        if route is not None:
            return self._routed(module, route, args, kwargs)
        return self._inner(module, self.program(self.shared.active), args, kwargs, None)

    def _routed(self, module: nn.Module, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        programs = [self.program(g.names) for g in route.groups]
        if all(p.empty for p in programs):
            for cell in self.sources.values():
                cell.value = None
            return self.original.forward(module, *args, **kwargs)
        source = {key: cell.take() for key, cell in self.sources.items()}
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not tensors:
            raise AdapterError(
                f"{type(module).__name__} is called without input, so it has no rows to route.",
                "Use an adapter that leaves its parameters alone, or switch adapters for the whole batch.",
            )
        n = tensors[0].shape[0]
        if n == 1 and route.size > 1:  # positions and the like are shared by the batch: give every row its own
            args = tuple(_spread(a, route.size) for a in args)
            kwargs = {k: _spread(a, route.size) for k, a in kwargs.items()}
            n = route.size
        out: Tensor | None = None
        shared, active = self.shared, self.shared.active
        try:
            shared.route = None  # modules within see the rows of one group only
            for group, program in zip(route.groups, programs, strict=True):
                shared.active = group.names
                rows = route.expand(group, n)
                some = tuple(_rows(a, n, rows) for a in args)
                named = {k: _rows(a, n, rows) for k, a in kwargs.items()}
                part = self._inner(module, program, some, named, {k: v[rows] for k, v in source.items()})
                if not isinstance(part, Tensor):
                    raise AdapterError(
                        f"{type(module).__name__} returns a {type(part).__name__}, which has no rows to route.",
                        "Use an adapter that leaves the parameters of the whole model's own module alone.",
                    )
                out = part.new_empty(n, *part.shape[1:]) if out is None else out
                out = out.index_copy(0, rows, part)
        finally:
            shared.route, shared.active = route, active
        return out

    def _inner(
        self,
        module: nn.Module,
        program: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: dict[str, Tensor] | None,
    ) -> Any:
        """Run the module with the weight and output deltas of `program`."""
        if program.empty:
            if source is None and self.sources:
                for cell in self.sources.values():
                    cell.value = None
            return self.original.forward(module, *args, **kwargs)
        if program.single is not None and args and program.single.plain:
            return self._single(module, program, args[0])
        x: Any = args[0] if args else next(iter(kwargs.values()), None)  # a table of positions is called without input
        if source is None:
            source = {key: cell.take() for key, cell in self.sources.items()}
        return self._outputs(module, program, len(program.rewrites), x, args, kwargs, source)

    def _single(self, module: nn.Module, program: Program, x: Tensor) -> Tensor:
        """The common case, one low-rank term on one linear map: one autograd function."""
        delta = program.single
        assert delta is not None
        frozen = read(module, program.reweights[0][0])
        if not fusable(x, frozen.weight, frozen.bias):
            return delta.fast(x, self.original.forward(module, x), frozen)
        A, B = delta.factors()
        return lowrank_linear(x, frozen.weight, frozen.bias, A.to(x.dtype), B.to(x.dtype), delta.scale)

    def _outputs(
        self,
        module: nn.Module,
        program: Program,
        depth: int,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: dict[str, Tensor],
    ) -> Any:
        """Apply the last `depth` rewrites around what lies within."""
        if depth == 0:
            return self._weights(module, program, x, args, kwargs)
        site, delta = program.rewrites[depth - 1]
        branch = site.kind == "branch"
        seen = x if branch else delta.input(x)
        y = self._outputs(module, program, depth - 1, seen, (seen, *args[1:]) if args else args, kwargs, source)
        extra: tuple[Any, ...] = ()
        if isinstance(y, tuple):
            y, extra = y[0], y[1:]
        y = _slice_output(site, y, lambda part: delta.output(source[delta.reads] if branch else seen, part))
        return (y, *extra) if extra else y

    def _weights(
        self,
        module: nn.Module,
        program: Program,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the frozen map with the weight deltas."""
        if not program.reweights:
            return self.original.forward(module, *args, **kwargs)
        if program.quick:
            return self._quick(module, program, len(program.reweights), x, args, kwargs)
        changed = effective(module, program)
        if self.original is nn.Linear or self.original is Conv1D:
            W = changed["weight"]
            assert W is not None
            return functional.linear(x, W if self.original is nn.Linear else W.t(), changed["bias"])
        self.effective = changed
        try:
            return self.original.forward(module, *args, **kwargs)
        finally:
            self.effective = {}

    def _quick(
        self,
        module: nn.Module,
        program: Program,
        depth: int,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if depth == 0:
            return self.original.forward(module, x, *args[1:], **(kwargs if args else {}))
        site, delta = program.reweights[depth - 1]
        seen = delta.input(x)
        y = self._quick(module, program, depth - 1, seen, args, kwargs)
        frozen = read(module, site)
        return _slice_output(site, y, lambda part: delta.fast(seen, part, frozen))


def effective(module: nn.Module, program: Program) -> dict[str, Tensor | None]:
    """Return the parameters of `module` as the reweights of `program` change them, in the module's own layout."""
    out: dict[str, Tensor | None] = dict(module._parameters)
    for site, delta in program.reweights:
        W, b = read_from(out, site)
        new_b = delta.bias(b)
        name = site.bias or "bias"
        if new_b is not b:
            out[name] = _patch_bias(out, name, new_b, site)
        new_W = delta.weight(W)
        if new_W is not W:
            out[site.parameter] = _patch(out[site.parameter], new_W, site)
    return out


def read_from(parameters: dict[str, Tensor | None], site: Site) -> Frozen:
    """Return the view that `place.read` gives, over a dictionary of parameters."""
    holder = nn.Module()
    holder._parameters = parameters  # type: ignore[assignment]
    return read(holder, site)


def _patch_bias(out: dict[str, Tensor | None], name: str, new: Tensor | None, site: Site) -> Tensor | None:
    """Put a slice's new bias among the other rows, which get zeros where the module has no bias."""
    if new is None or site.rows is None:
        return new
    old, W = out.get(name), out[site.parameter]
    assert W is not None
    old = new.new_zeros(W.shape[1 if site.kind == "conv1d" else 0]) if old is None else old
    return torch.cat([old[: site.rows[0]], new, old[site.rows[1] :]])


def _patch(old: Tensor | None, new: Tensor, site: Site) -> Tensor:
    """Put a view's new value back into the layout of the parameter it came from."""
    whole = site.rows is None
    assert old is not None
    if site.unit_offset:
        return new - 1
    if site.kind == "conv2d":
        return new.view_as(old)
    if site.kind in ("conv1d", "embedding"):
        new = new.t()
        if whole:
            return new
        a, z = site.rows  # type: ignore[misc]
        return torch.cat([old[:, :a], new, old[:, z:]], dim=1)
    if whole:
        return new
    a, z = site.rows  # type: ignore[misc]
    return torch.cat([old[..., :a, :], new, old[..., z:, :]], dim=-2)


def _slice_output(site: Site, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if site.rows is None:
        return change(y)
    a, z = site.rows
    return torch.cat([y[..., :a], change(y[..., a:z].contiguous()), y[..., z:]], dim=-1)


def _rows(value: Any, n: int, rows: Tensor) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == n:
        return value[rows]
    return value


def _spread(value: Any, n: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1:
        return value.expand(n, *value.shape[1:])
    return value
