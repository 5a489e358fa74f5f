"""S-BitFit: what is kept is what the salience by hand says; it trains again from zero, with new optimizer state."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

import peftree
import zoo


@pytest.mark.parametrize("unit", ["module", "entry"])
def test_what_is_kept_and_where_it_starts_again(unit: Literal["module", "entry"]) -> None:
    model = zoo.build("bert_cls").train()
    adapter = peftree.adapt(model, "s_bitfit", head=False, share=0.2, unit=unit)
    deltas = list(adapter.deltas.values())
    biases = [p for n, p in adapter.state().items() if n.endswith("/db")]
    optimizer = torch.optim.AdamW(adapter.param_groups(1e-2))
    sums = [torch.zeros_like(p) for p in biases]
    for step in range(1, 7):
        model(**zoo.batch("bert_cls")).loss.backward()
        if step <= 3:
            sums = [s + (p * p.grad).abs() for s, p in zip(sums, biases, strict=True)]
        adapter.before_step(step, 6, optimizer)
        optimizer.step()
        adapter.step(step, 6, optimizer)
        if step == 3:
            assert not any(p.any() for p in biases) and not optimizer.state
        optimizer.zero_grad()
    masks = [d.state_dict()["mask"] for d in deltas]
    total = sum(p.numel() for p in biases)
    assert sum(int(m.sum()) for m in masks) == round(0.2 * total)
    scores = torch.cat([s if unit == "entry" else s.mean().expand_as(s) for s in sums])
    kept = torch.cat(masks)
    assert scores[kept].min() >= scores[~kept].max()
    moved = torch.cat([p.detach() for p in biases])
    assert not moved[~kept].any() and moved[kept].any()
    if unit == "module":  # at most one bias is kept in part, where the share runs out
        assert sum(0 < int(m.sum()) < m.numel() for m in masks) <= 1
