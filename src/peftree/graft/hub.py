"""The hub: the child `deltas` of an adapted module, which holds deltas and runs the module with the active ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from peftree.deltas.lowrank import together
from peftree.deltas.packed import is_packed
from peftree.deltas.place import read
from peftree.deltas.verbs import Delta, Host
from peftree.errors import AdapterError
from peftree.graft.call import Choice, PerThread, Shared
from peftree.graft.mixed import Mixed
from peftree.graft.program import Program, Route, compile_program, narrowed, of_rows, spread, swapped
from peftree.graft.weights import effective, slice_output
from peftree.sites import Site


class Cell(PerThread):
    """A slot that carries a sub-layer's input from the module where it enters to the one where it leaves."""

    value: Tensor | None = None

    def take(self) -> Tensor:
        """Return the value and forget it, so that no graph outlives the step."""
        value, self.value = self.value, None
        if value is None:
            raise RuntimeError("a branch ran before its input was seen: the base model's layer order is unusual")
        return value


class Changed(PerThread):
    """Parameters with a changed value while the module's own forward runs, else None; `busy`: a patched one runs."""

    effective: Mapping[str, Tensor | None] | None = None
    busy: bool = False


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
        """Yield key, site and delta in the order in which they were put on."""
        for key, site in self.sites.items():
            yield key, site, self._modules[key]  # type: ignore[misc]


class Hub(Host):
    """Holds the bundles of a module by adapter name and runs the module.

    Attributes:
        path: the path of the module in the model.
        original: the module's own class, and `takes` the names of what its forward takes, in order.
        strange: whether the frozen module runs a forward that is not its class's.
        changed: parameters with a changed value while the module's own forward runs.
        cells: slots to fill with this module's input (it opens a branch).
        sources: slot of each branch that leaves here, by (site's reads).
        outer: the part of the work that belongs to a stack, layer, entry or attention, if this module has one.
        door: the first of them in a module that users call.
        opaque: see `opaque`; packed: the weight is that of a quantised base.
        length_first: the module takes `[length, rows, width]`; swaps: others of the model do.
        form: what computes the frozen module's output and keeps less (`graft.forms`); tried: what it found out.
    """

    original: type[nn.Module]
    takes: list[str]
    strange: bool = False
    opaque: bool = False
    packed: bool = False
    length_first: bool = False
    swaps: bool = False
    door: Any = None
    form: Any = None
    tried: tuple[Any, ...] = ()

    def __init__(self, shared: Shared, path: str) -> None:
        super().__init__()
        self.shared = shared
        self.path = path
        self.changed = Changed()
        self.cells: list[Cell] = []
        self.sources: dict[str, Cell] = {}
        self.outer: list[Callable[..., Any]] = []
        self.programs: dict[tuple[str, ...], Program] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a plain attribute; children are bundles, and an adapter may be called `training` or `effective`."""
        object.__setattr__(self, name, value)

    def bundle(self, adapter: str) -> Bundle:
        """Return the bundle of `adapter`; create it the first time."""
        if adapter not in self._modules:
            self._modules[adapter] = Bundle()
        self.programs.clear()
        self.shared.unseen.add(self.path)
        return self._modules[adapter]  # type: ignore[return-value]

    def frozen(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the frozen module."""
        return self.reading({}, module, args, kwargs)

    def alone(self, module: nn.Module, x: Tensor) -> Any:
        """Run the module without deltas, from within a delta; with its patch, unless that is running."""
        if self.changed.busy:
            return self.frozen(module, x)
        with self.shared.keep(Choice()):
            return module(x)

    def reading(self, changed: Mapping[str, Tensor | None], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run the frozen module, which reads `changed` in place of its own parameters."""
        before, self.changed.effective = self.changed.effective, changed
        try:
            return self.call(module, *args, **kwargs)
        finally:
            self.changed.effective = before

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward; it takes no weight that is packed no longer (changed, or merged)."""
        if self.packed:
            W: Any = module.weight
            if not is_packed(W):
                b: Any = module.bias
                return functional.linear(args[0], W.to(args[0].dtype), None if b is None else b.to(args[0].dtype))
        if self.form is not None and not self.changed.effective:
            made = self.form.of(self, module, args, kwargs)
            if made is not None:
                return made
        return self.original.forward(module, *args, **kwargs)

    def program(self, names: tuple[str, ...]) -> Program:
        """Return the program of these adapters, compiled once."""
        found = self.programs.get(names)
        if found is None:
            bundles = [self._modules[n] for n in names if n in self._modules]
            found = compile_program((s, d) for b in bundles for _, s, d in b.items())  # type: ignore[union-attr,operator]
            if self.opaque or self.strange:
                found.quick, found.fused = False, []
            self.programs[names] = found
        return found

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int = 0) -> Any:
        """Run the adapted module; `at` counts the outer parts that have already run."""
        if at < len(self.outer):
            return self.outer[at](self, module, args, kwargs, at + 1)
        choice = self.shared.run.choice
        if choice is None:
            choice = self.shared.chosen()
        if self.cells and (choice.active or choice.route):
            value = args[0] if args else next(iter(kwargs.values()))
            for cell in self.cells:
                cell.value = value
        if choice.route is not None:
            return self._routed(module, choice, choice.route, args, kwargs)
        program = self.program(choice.active)
        if choice.unseen is not None and not program.empty:
            choice.used(self.path)
        return self._inner(module, program, args, kwargs, None)

    def _routed(
        self, module: nn.Module, choice: Choice, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        mixed = Mixed.of(route, self)
        if mixed.empty:
            for cell in self.sources.values():
                cell.value = None
            return self.frozen(module, *args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if self.length_first or (self.swaps and tensors and route.size > 1 and swapped(tensors[0], route.size)):
            raise AdapterError(
                f"{self.path} takes the length of a text first and its rows second, so rows cannot be routed there.",
                "Switch adapters for the whole batch, or adapt other modules.",
            )
        choice.used(self.path)
        source = {key: cell.take() for key, cell in self.sources.items()}
        if not tensors:
            raise AdapterError(
                f"{type(module).__name__} was called without input, so it has no rows to route.",
                "Use an adapter that does not change its parameters, or switch adapters for the whole batch.",
            )
        n = tensors[0].shape[0]
        if n == 1 and route.size > 1:  # positions and the like are shared by the batch: give every row its own
            args = tuple(spread(a, route.size) for a in args)
            kwargs = {k: spread(a, route.size) for k, a in kwargs.items()}
            n = route.size
        if mixed.after:
            return self._after(module, route, n, args, kwargs, source)
        out: Tensor | None = None
        served: list[int] = []
        if len(args) == 1 and not kwargs and mixed.takes(route, args[0]):
            out, served = self._together(module, mixed, route, n, args[0])
            if out is not None and mixed.rows is None:
                return out
        for number, group in enumerate(route.groups):
            if number in served:
                continue
            rows = route.expand(group, n).to(tensors[0].device)
            some = tuple(of_rows(a, n, rows) for a in args)
            named = {k: of_rows(a, n, rows) for k, a in kwargs.items()}
            within = choice._replace(active=group.names, route=None)
            with narrowed(route, group), self.shared.keep(within):  # modules within see one group only
                given = {k: v[rows] for k, v in source.items()}
                part = self._inner(module, mixed.programs[number], some, named, given)
            out = self._put(module, out, n, rows, part)
        return out

    def _put(self, module: nn.Module, out: Tensor | None, n: int, rows: Tensor, part: Any) -> Tensor:
        """Put the output of some rows among those of all `n`."""
        if not isinstance(part, Tensor):
            raise AdapterError(
                f"{type(module).__name__} returns a {type(part).__name__}, which has no rows to route.",
                "Use an adapter that does not change the parameters of the whole model's own module.",
            )
        out = part.new_empty(n, *part.shape[1:]) if out is None else out
        return out.index_copy(0, rows, part)

    def _together(
        self, module: nn.Module, mixed: Mixed, route: Route, n: int, x: Tensor
    ) -> tuple[Tensor | None, list[int]]:
        """Run the rows whose adapters are low-rank as one; return the output and which groups it serves."""
        rows = route.expand(mixed.rows or route.groups[0], n).to(x.device)
        some = x[rows] if mixed.rows else x
        y = mixed.add(some, self.frozen(module, some))
        if y is None:
            return None, []
        return (self._put(module, None, n, rows, y) if mixed.rows else y), mixed.low

    def _after(
        self,
        module: nn.Module,
        route: Route,
        n: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: dict[str, Tensor],
    ) -> Any:
        """Run the frozen module once for all `n` rows, then change each group's rows of the output."""
        x = args[0] if args else next(iter(kwargs.values()))
        entering, parts = x, []
        for group in route.groups:
            rows, rewrites = route.expand(group, n).to(x.device), self.program(group.names).rewrites
            seen = [x[rows]]
            with narrowed(route, group):
                for site, delta in reversed(rewrites):
                    seen.append(seen[-1] if site.kind == "branch" else delta.input(seen[-1]))
            if seen[-1] is not seen[0]:
                entering = entering.index_copy(0, rows, seen[-1].to(x.dtype))
            parts.append((group, rows, rewrites, seen[1:]))
        if entering is not x:
            args, kwargs = ((entering, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): entering})
        out = self.frozen(module, *args, **kwargs)
        y = out[0] if isinstance(out, tuple) else out
        for group, rows, rewrites, seen in parts:
            part = y[rows]
            with narrowed(route, group):
                for (site, delta), own in zip(rewrites, reversed(seen), strict=True):
                    given = source[delta.reads][rows] if site.kind == "branch" else own
                    part = slice_output(site, part, functools.partial(delta.output, given))
            y = y.index_copy(0, rows, part)
        return (y, *out[1:]) if isinstance(out, tuple) else y

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
            return self.frozen(module, *args, **kwargs)
        if program.fused and args and not program.rewrites:
            return self._weights(module, program, args[0], args, kwargs)
        x: Any = args[0] if args else next(iter(kwargs.values()), None)  # a table of positions is called without input
        if source is None:
            source = {key: cell.take() for key, cell in self.sources.items()}
        return self._outputs(module, program, len(program.rewrites), x, args, kwargs, source)

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
        """Apply the last `depth` rewrites around what is inside."""
        if depth == 0:
            return self._weights(module, program, x, args, kwargs)
        site, delta = program.rewrites[depth - 1]
        branch = site.kind == "branch"
        seen = x if branch else delta.input(x)
        y = self._outputs(module, program, depth - 1, seen, (seen, *args[1:]) if args else args, kwargs, source)
        extra: tuple[Any, ...] = ()
        if isinstance(y, tuple):
            y, extra = y[0], y[1:]
        y = slice_output(site, y, lambda part: delta.output(source[delta.reads] if branch else seen, part))
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
            return self.frozen(module, *args, **kwargs)
        if program.fused and args and not self.packed:
            made = together(program.fused, x, read(module, program.reweights[0][0]))
            if made is not None:
                return made
        if program.quick:
            return self._quick(module, program, len(program.reweights), x, args, kwargs)
        changed = effective(module, program)
        if (self.original is nn.Linear or self.original is Conv1D) and not self.strange and "weight" in changed:
            W = changed["weight"]
            assert W is not None
            return functional.linear(x, W if self.original is nn.Linear else W.t(), changed["bias"])
        return self.reading(changed, module, args, kwargs)

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
            return self.frozen(module, x, *args[1:], **(kwargs if args else {}))
        site, delta = program.reweights[depth - 1]
        seen = delta.input(x)
        y = self._quick(module, program, depth - 1, seen, args, kwargs)
        frozen = read(module, site)
        return slice_output(site, y, lambda part: delta.fast(seen, part, frozen))
