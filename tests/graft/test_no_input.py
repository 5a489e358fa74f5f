"""Modules that are called without input, as Swin's table of positions: changed weights reach them, rows cannot."""

from __future__ import annotations

import pytest
import torch

import peftree
import zoo
from peftree.errors import AdapterError


def test_a_module_without_input_takes_changed_weights() -> None:
    model, batch = zoo.build("swin"), zoo.batch("swin")

    def logits() -> torch.Tensor:
        with torch.no_grad():  # where the table needs a gradient, torch takes another attention kernel
            found: torch.Tensor = model(**batch).logits
        return found

    before = logits()
    adapter = peftree.adapt(model, "full")
    assert torch.equal(logits(), before)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    key, delta = next((k, d) for k, d in adapter.deltas.items() if "relative_position_bias" in k)
    (value,) = delta.parameters()
    assert value.grad is not None and bool(value.grad.any()), key
    with torch.no_grad():
        value.add_(1.0 + torch.randn_like(value))
    assert not torch.equal(logits(), before)
    peftree.switch(model, None)
    assert torch.equal(logits(), before)


def test_rows_cannot_be_routed_through_it() -> None:
    model, batch = zoo.build("swin"), zoo.batch("swin")
    peftree.adapt(model, "full", name="a")
    with peftree.route(model, ["a", None, "a"]), pytest.raises(AdapterError, match="no rows to route"):
        model(**batch)
