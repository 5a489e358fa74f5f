"""Checks on what training leaves: a trained adapter comes back, tensors move with the model, the base is untouched."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import peftree
from contract.case import Case, close, shake
from peftree.deltas import LINEAR, Delta, Frozen, Reweight, read
from peftree.deltas.fused import fast_forms
from peftree.methods.contract import own

STEPS = 4


def train(case: Case, model: nn.Module, adapter: Any, steps: int = STEPS, rate: float = 1e-2) -> None:
    """Train as `AdapterTrainer` does, every hook in its place."""
    optimizer = case.optimizer(adapter, rate)
    adapter.start(0, steps, optimizer)
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        out = model(**case.batch)
        extra = adapter.aux_loss(step - 1, steps, outputs=out, again=lambda: model(**case.batch))
        assert extra is None or torch.isfinite(extra), f"aux_loss is not finite in step {step}"
        (case.loss(model) if extra is None else case.loss(model) + extra).backward()
        adapter.before_step(step, steps, optimizer)
        optimizer.step()
        adapter.step(step, steps, optimizer, [lambda: case.loss(model)])
        in_groups(model, optimizer, step)
    model.eval()


def in_groups(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Whether all that is trainable after a step is the optimizer's."""
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    still = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in moved]
    assert not still, f"after step {step} {still[0]} is trainable, and in no group of the optimizer"


def comes_back(case: Case, model: nn.Module, adapter: Any, when: str) -> None:
    want = case.run(model)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "x"
        peftree.save(adapter, where, format="native")
        with safe_open(where / "adapter.safetensors", "pt") as file:
            assert set(file.keys()) == set(adapter.state()), "the file must hold the adapter's tensors and nothing else"
        fresh = case.base()
        peftree.load(fresh, where)
        assert torch.equal(case.run(fresh.eval()), want), (
            f"save and load change the output {when}; what it depends on must be a parameter or a buffer"
        )


def round_trip(case: Case) -> None:
    """Some steps with every hook, saved and loaded; then finished, saved and loaded."""
    model, adapter = case.adapted(shaken=True)
    train(case, model, adapter)
    comes_back(case, model, adapter, "after training")
    want = case.run(model)
    adapter.finish()
    got = case.run(model)
    assert close(got, want), f"post_hoc changes the output by {float((got - want).abs().max()):.1e}"
    comes_back(case, model, adapter, "after post_hoc")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, or in its lists, tuples and tables."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _held(module: nn.Module) -> dict[str, list[Tensor]]:
    """The tensors that a module holds beside its parameters and buffers, by the name of its attribute."""
    own = {n: v for n, v in vars(module).items() if n not in ("_parameters", "_buffers", "_modules")}
    known = {id(t) for t in (*module._parameters.values(), *module._buffers.values())}
    return {n: [t for t in _tensors(v) if id(t) not in known] for n, v in own.items()}


def _loose(module: nn.Module) -> list[str]:
    """Names of attributes with tensors that are not of one pass: those have a graph."""
    return [n for n, held in _held(module).items() if any(t.grad_fn is None for t in held)]


def registered(case: Case) -> None:
    model, adapter = case.adapted(shaken=True)
    with torch.inference_mode():
        model(**case.batch)
    case.loss(model).backward()
    modules = [m for d in adapter.deltas.values() for m in d.modules()]
    loose = [f"{type(m).__name__}.{n}" for m in modules for n in _loose(m)]
    assert not loose, f"{loose[0]} is a plain tensor, which does not move, save or copy with the model; register it"
    before = [{n: len(held) for n, held in _held(m).items()} for m in modules]
    case.loss(model.train())
    case.loss(model)
    grown = [f"{type(m).__name__}.{n}" for m, had in zip(modules, before, strict=True)
             for n, held in _held(m).items() if len(held) > max(1, had.get(n, 0))]  # fmt: skip
    assert not grown, f"{grown[0]} keeps tensors of one pass beside those of the next, so memory grows; drop them"
    weights = [p for p in case.base().parameters() if p.dim() > 1]
    held = [f"{type(m).__name__}.{n}" for m in modules for n, b in m._buffers.items() if b is not None
            and any(b.shape == w.shape and torch.equal(b, w) for w in weights)]  # fmt: skip
    assert not held, f"{held[0]} is a copy of a frozen weight; read it in the pass, from `frozen`"


def repeats(case: Case) -> None:
    """Two trainings that draw the same end in the same tensors: a run keeps nothing for the next."""
    ends = []
    for _ in range(2):
        torch.manual_seed(0)
        model, adapter = case.adapted()
        train(case, model, adapter, steps=2)
        ends.append(adapter.state())
    wrong = [n for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])]
    assert not wrong, f"{wrong[0]} differs after a second, equal training; keep nothing outside the adapter"


def _facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The plain attributes of every base module."""
    base = {n: m for n, m in model.named_modules() if ".deltas" not in f".{n}"}
    simple = int | float | str | bool | tuple | None
    return {n: {k: v for k, v in vars(m).items() if isinstance(v, simple) and k != "training"} for n, m in base.items()}


def base_untouched(case: Case) -> None:
    before = _facts(case.base())
    model, adapter = case.adapted()
    train(case, model, adapter, steps=1)
    after = _facts(model)
    changed = [
        f"{n}.{k}" for n in before for k in before[n] | after[n] if before[n].get(k, ...) != after[n].get(k, ...)
    ]
    assert not changed, f"{changed[0]} of the base is changed; a delta keeps what it needs in itself"


def _reads(delta: Delta, frozen: Frozen) -> bool:
    """Whether the delta needs the values of the dense weight, which are not there."""
    assert isinstance(delta, Reweight)
    out, width = frozen.weight.shape[-2:]
    try:
        if not delta.quick:
            return delta.weight(frozen.weight.to("meta")).is_meta
        y = delta.fast(torch.ones(1, 2, width), torch.ones(1, 2, out), Frozen(frozen.weight.to("meta"), frozen.bias))
    except (RuntimeError, NotImplementedError):
        return True
    return y.is_meta


def dense_weight(case: Case) -> None:
    model, adapter = case.adapted()
    shake(adapter)
    for index, part in enumerate(case.method.parts()):
        sites = {key: site for key, site, _ in adapter.entries}
        mine = {k: d for k, d in own(adapter.deltas, index).items() if isinstance(d, Reweight)}
        linear = {k: d for k, d in mine.items() if sites[k].kind in LINEAR}
        module = {k: model.get_submodule(sites[k].path) for k in linear}
        reads = [k for k, d in linear.items() if _reads(d, read(module[k], sites[k]))]
        said = type(part).tags.needs_dense_weight
        assert said or not reads, (
            f"{reads[0]} reads the dense weight, which a quantised base has not; say needs_dense_weight, or give `fast`"
        )


def autocast(case: Case) -> None:
    """Against float32: bfloat16 has 8 bits, so gradients agree in direction, not in digits."""
    model, adapter = case.adapted(shaken=True)
    losses, grads = [], []
    for on in (False, True):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = case.loss(model)
            extra = adapter.aux_loss(outputs=None, again=lambda: model(**case.batch))
            loss = loss if extra is None else loss + extra
        loss.backward()
        losses.append(float(loss.detach()))
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    full, half = grads
    assert set(full) == set(half), f"under autocast other tensors have a gradient: {sorted(set(full) ^ set(half))[:3]}"
    lost = [n for n, g in half.items() if g.dtype != torch.float32 or bool(full[n].any()) != bool(g.any())]
    assert not lost, f"under autocast the gradient of {lost[:3]} is gone or not float32"
    assert abs(losses[1] - losses[0]) < 0.05 * max(1.0, abs(losses[0])), f"under autocast the loss moves: {losses}"
    one, two = (torch.cat([g.flatten() for g in found.values()]) for found in grads)
    alike = float(torch.cosine_similarity(one, two, dim=0))
    assert alike > 0.85, f"under autocast the gradient points elsewhere, cosine {alike:.2f}"


def compiled_passes(case: Case) -> None:
    """Forward and backward passes of training that torch.compile traced, beside plain ones.

    A compiled pass takes no fast form, whose dropout would draw another mask.
    """
    found = []
    for on in (False, True):
        model, _ = case.adapted(shaken=True)
        torch._dynamo.reset()
        net = torch.compile(model.train(), backend="aot_eager") if on else model.train()
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            with fast_forms(on):
                case.loss(net).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, fast = found
    assert list(plain) == list(fast), f"compiled, other tensors have a gradient: {sorted(set(plain) ^ set(fast))[:3]}"
    wrong = [n for n in plain if not close(fast[n], plain[n], 1e-4)]
    assert not wrong, f"compiled, the gradient of {wrong[:3]} differs"
