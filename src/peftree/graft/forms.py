"""Modules with a form that keeps less for the backward pass: RMSNorm, and a gated feed-forward network.

They are found by what they compute, not by name. A stand-in of the module's class, with its own settings and small
random weights, must give the form's output bit for bit, and its gradients up to rounding. Whatever then differs in a
run (other settings, another activation, hooks on it, a changed or trained weight, no gradient, `torch.compile`) runs
the module's own forward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from peftree.deltas.fused import fast_forms_on
from peftree.deltas.gated import again, closed, gated
from peftree.deltas.normed import RMS, normed
from peftree.graft.call import carry
from peftree.graft.hub import Hub

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (int, float, str, bool)
_CLOSE = 1e-6  # of the largest gradient
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Call = Callable[..., Any]


@dataclass(frozen=True)
class Form:
    """What computes a module's output and keeps less for the backward pass; `settings` are those it was found with."""

    settings: dict[str, Any] = field(default_factory=dict, compare=False, kw_only=True)

    def of(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module computes; None if its own forward must run."""
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or not torch.is_grad_enabled() or not fast_forms_on(x):
            return None
        return self.output(hub, module, x) if self.settings.items() <= vars(module).items() else None

    def output(self, hub: Hub, module: Any, x: Tensor) -> Any:
        """Return the output for one input; None if the module's own forward must run."""
        raise NotImplementedError


@dataclass(frozen=True)
class Norm(Form):
    """An RMSNorm."""

    how: RMS

    def output(self, hub: Hub, module: Any, x: Tensor) -> Tensor | None:
        """Return the normalised rows, unless the weight is trained or of another dtype."""
        w = module._parameters.get("weight")
        fits = (
            w is not None
            and not w.requires_grad
            and x.dtype == w.dtype
            and x.dtype in _DTYPES
            and x.shape[-1:] == w.shape
        )
        return normed(x, w, self.how) if fits else None


@dataclass(frozen=True)
class Gated(Form):
    """A gated feed-forward network, `down(act(gate(x)) up(x))`: the names of its parts, and the activation's class."""

    gate: str
    up: str
    down: str
    act: str
    kind: type[nn.Module]

    def output(self, hub: Hub, module: Any, x: Tensor) -> Any:
        """Return the output of `down`, unless the activation was replaced or something hears it."""
        parts = module._modules
        act, gate, up = parts[self.act], parts[self.gate], parts[self.up]
        if type(act) is not self.kind or _heard(act):
            return None
        if hub.shared.activations == "recompute" and (found := _repeats(hub, gate, up)) is not None:
            draws, *programs = found

            def run(x: Tensor) -> Tensor:
                return gated(gate(x), up(x), act)

            read = [p for m in (gate, up) for p in m.parameters()]
            if len(hub.tried) != 3 or any(a is not b for a, b in zip(hub.tried, programs, strict=False)):
                hub.tried = (*programs, closed(run, x, read))
            if hub.tried[-1] and (x.device.type == "cpu" or not draws):
                return parts[self.down](again(_in_mode(carry(run), gate, up), x, read, draws))
        return parts[self.down](gated(gate(x), up(x), act))


def _in_mode(run: Call, *maps: nn.Module) -> Call:
    """Return `run` with the maps in training or evaluation, as they are now."""
    modes = [m.training for m in maps]

    def ran(x: Tensor) -> Any:
        before = [m.training for m in maps]
        try:
            _ = [m.train(mode) for m, mode in zip(maps, modes, strict=True)]
            return run(x)
        finally:
            _ = [m.train(mode) for m, mode in zip(maps, before, strict=True)]

    return ran


def _heard(module: nn.Module) -> bool:
    return _has_any_global_hook() or any(vars(module)[name] for name in _HOOKS)


def _repeats(hub: Hub, *maps: Any) -> tuple[bool, Any, Any] | None:
    """Return None if the maps may not run a second time; else whether they draw random numbers, and their programs."""
    choice, draws = hub.shared.now, False
    programs: list[Any] = []
    if choice.route is not None or torch._C._autograd._top_saved_tensors_default_hooks(True):
        return None
    for module in maps:
        inner = module._modules.get("deltas")
        program = inner.program(choice.active) if isinstance(inner, Hub) else None
        programs.append(program)
        if _heard(module) or "forward" in vars(module):
            return None
        if program is None:
            continue
        if inner.outer or inner.cells or not (program.empty or program.fused):
            return None
        draws |= any(d.training and vars(d).get("dropout") for d in program.fused)
    return draws, programs[0], programs[1]


def find(modules: Mapping[str, nn.Module]) -> dict[str, Form]:
    """Return the forms of modules by path, each kind of module tried once on a stand-in on the CPU."""
    known: dict[Any, Form | None] = {}
    found = {}
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        for path, module in modules.items():
            parts = _parts(module)
            if parts is None:
                continue
            key = (_key(module), *((n, m if isinstance(m, int) else _key(m)) for n, m in parts.items()))
            if key not in known:
                known[key] = _form(module, parts)
            if (form := known[key]) is not None:
                found[path] = replace(form, settings={n: v for n, v in _set(module).items() if isinstance(v, _PLAIN)})
    return found


def _parts(module: nn.Module) -> dict[str, Any] | None:
    """Return the width of the only weight of what may be a norm, or three maps and an activation; None of others."""
    own, children = module._parameters, module._modules
    if "forward" in vars(module) or module._buffers:
        return None
    if not children:
        w = own.get("weight")
        return {"weight": len(w)} if len(own) == 1 and w is not None and w.dim() == 1 and len(w) else None
    if own or len(children) != 4 or sum(isinstance(m, nn.Linear | Conv1D) for m in children.values()) != 3:
        return None
    return None if None in children.values() else dict(children)


def _key(module: nn.Module) -> Any:
    """Return what tells modules apart that compute otherwise, their weights left out."""
    return type(module), frozenset((n, v if isinstance(v, _PLAIN) else id(v)) for n, v in _set(module).items())


def _set(module: nn.Module) -> dict[str, Any]:
    return {n: v for n, v in vars(module).items() if not n.startswith("_") and n != "training"}


def _form(module: nn.Module, parts: dict[str, Any]) -> Form | None:
    if "weight" in parts:
        return _norm(module, parts["weight"])
    maps = [n for n, m in parts.items() if isinstance(m, nn.Linear | Conv1D)]
    (rest,) = parts.keys() - set(maps)
    return None if next(parts[rest].parameters(), None) is not None else _gated(module, maps, rest, parts[rest])


def _randn(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float32)


def _norm(module: nn.Module, width: int) -> Norm | None:
    draw = torch.Generator().manual_seed(0)
    x = _randn(draw, 4, 2, width) * torch.tensor([1e-3, 0.1, 1.0, 30.0], dtype=torch.float32)[:, None, None]
    w = _randn(draw, width)

    def own(x: Tensor, w: Tensor) -> Tensor:
        y: Tensor = _stand_in(module, {"weight": nn.Parameter(w, False)}, {})(x)
        return y

    numbers = {v for v in vars(module).values() if type(v) is float and 0 < v < 0.1}
    for eps, offset, narrow in itertools.product(sorted(numbers), (0, 1), (True, False)):
        how = RMS(eps, offset, narrow)
        same = (_same(own, how.plain, x.to(t), w.to(t)) for t in _DTYPES)
        if all(same) and _alike(functools.partial(own, w=w), functools.partial(normed, w=w, how=how), x):
            return Norm(how)
    return None


def _gated(module: nn.Module, maps: list[str], rest: str, act: nn.Module) -> Gated | None:
    draw, linear = torch.Generator().manual_seed(0), {name: nn.Linear(8, 8, device="meta") for name in maps}
    x = _randn(draw, 3, 4, 8)
    for m in linear.values():
        m.weight, m.bias = (nn.Parameter(_randn(draw, *shape), False) for shape in ((8, 8), (8,)))
    own = _stand_in(module, {}, {**linear, rest: act})
    for gate, up, down in itertools.permutations(maps):
        form = functools.partial(_by_gate, linear[gate], linear[up], linear[down], act)
        if _same(own, form, x) and _alike(own, form, x):
            return Gated(gate, up, down, rest, type(act))
    return None


def _by_gate(gate: Call, up: Call, down: Call, act: Call, x: Tensor) -> Any:
    return down(gated(gate(x), up(x), act))


def _stand_in(module: nn.Module, parameters: dict[str, Any], children: dict[str, Any]) -> Call:
    """Return the forward of a module like this one, in training, with other parameters and children."""
    kind = type(module)
    made = kind.__new__(kind)
    vars(made).update(vars(module) | {"_parameters": parameters, "_modules": children, "training": True})
    return functools.partial(kind.forward, made)


def _same(one: Call, other: Call, *given: Tensor) -> bool:
    """Return whether two functions give the same, bit for bit."""
    try:
        return torch.equal(one(*given), other(*given))
    except Exception:  # noqa: BLE001  (another forward may need anything)
        return False


def _alike(one: Call, other: Call, x: Tensor) -> bool:
    """Return whether two functions have the same gradient, up to rounding."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    a, b = (torch.autograd.grad(f(leaf).sin().sum(), leaf)[0] for f, leaf in zip((one, other), leaves, strict=True))
    return bool((a - b).abs().max() <= _CLOSE * a.abs().max())
