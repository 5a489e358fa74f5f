"""Every method on a GPU, beside its own results on the CPU: outputs, gradients, bf16, files, checkpointed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
from contract.case import Case, close, fits, small
from contract.test_contract import METHODS, quick_model, variant
from peftree.adapter import Adapter

OWN = [name for name in METHODS if not variant(name) and fits(small(name, quick_model(name)))]
TOLERANCE = 2e-4  # sums in another order


def put(case: Case, device: torch.device) -> tuple[nn.Module, Adapter, Case]:
    """Return the method on a model that lies on a device, and the case with its batch there."""
    there = Case(case.method, case.model)
    there.batch = {name: value.to(device) for name, value in case.batch.items()}
    model = there.base().to(device)
    adapter = peftree.adapt(model, case.method, name="a", seed=0)
    if case.tags.needs_data:
        adapter.init([lambda: there.loss(model)])
    return model.eval(), adapter, there


def follow(adapter: Adapter, first: Adapter) -> None:
    """Give an adapter the values of another one, wherever they lie: equal seeds draw other numbers on a GPU."""
    mine = adapter.state()
    assert list(mine) == list(first.state())
    with torch.no_grad():
        for key, value in first.state().items():
            mine[key].copy_(value)


def passed(case: Case, model: nn.Module, adapter: Adapter, half: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss and the gradients, on the CPU."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=half):
        loss = case.loss(model)
        extra = adapter.aux_loss(outputs=None, again=lambda: model(**case.batch))
        loss = loss if extra is None else loss + extra
    loss.backward()
    named = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss.detach().cpu(), named


@pytest.mark.parametrize("name", OWN)
def test_it_computes_what_it_computes_on_a_cpu(name: str, device: torch.device, tmp_path: Path) -> None:
    case = small(name, quick_model(name))
    base, first = case.adapted(shaken=True)
    model, adapter, there = put(case, device)
    follow(adapter, first)
    places = {
        p.device.type for p in (*adapter.parameters(), *(b for d in adapter.deltas.values() for b in d.buffers()))
    }
    assert places == {device.type}, "all that a method makes lies where its site does"
    assert close(there.run(model).cpu(), case.run(base), TOLERANCE)
    (loss, grads), (want, wanted) = passed(there, model, adapter), passed(case, base, first)
    assert close(loss, want, TOLERANCE) and list(grads) == list(wanted)
    worst = {
        n: float((grads[n] - wanted[n]).abs().max()) for n in grads if not close(grads[n], wanted[n], 10 * TOLERANCE)
    }
    assert not worst
    folder = peftree.save(adapter, tmp_path / "a")
    back = case.base()
    peftree.load(back, folder, name="a")
    assert close(case.run(back.eval()), case.run(base), TOLERANCE), "saved there, it is the same here"


@pytest.mark.parametrize("name", [n for n in OWN if "autocast" not in small(n, quick_model(n)).tags.known])
def test_it_has_gradients_in_bf16(name: str, device: torch.device) -> None:
    case = small(name, quick_model(name))
    _, first = case.adapted(shaken=True)
    model, adapter, there = put(case, device)
    follow(adapter, first)
    (full, exact), (half, rough) = passed(there, model, adapter), passed(there, model, adapter, half=True)
    assert list(exact) == list(rough) and abs(float(full - half)) < 0.05 * max(1.0, abs(float(full)))
    one, two = (torch.cat([g.flatten().float() for g in found.values()]) for found in (exact, rough))
    assert torch.cosine_similarity(one, two, dim=0) > 0.85


@pytest.mark.parametrize("name", OWN)
def test_checkpointed_layers_give_the_same_gradients(name: str, device: torch.device) -> None:
    model, adapter, there = put(small(name, quick_model(name)), device)
    found: list[Any] = []
    for on in (False, True):
        if on:
            model.train().activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        torch.manual_seed(0)
        found.append(passed(there, model.train(), adapter)[1])
    assert list(found[0]) == list(found[1])
    assert all(close(found[1][n], found[0][n], TOLERANCE) for n in found[0])
