"""Fast forms of DoRA and (IA)3 beside the plain ones: factors whose operand is made again instead of kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import zoo
from graft.helpers import far, put
from methods.moves import grads_of
from methods.test_fast_forms import kept_mask, passed, relative
from peftree.deltas import dropped, fused, lowrank_linear
from peftree.deltas.fused import fast_forms
from peftree.deltas.scaled import scaled
from peftree.evaluate.cost import saved_bytes
from sampled import quick


@pytest.mark.parametrize("case", ["", "bias", "dropout", "in place", "a zero", "frozen A", "checkpointed"])
def test_dora_is_the_plain_expression(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, whether what the factor multiplies is made from the output or kept; with the same mask."""
    masks: list[dropped.Dropped] = []
    own = dropped.dropped
    monkeypatch.setattr(fused, "dropped", lambda x, p: masks.append(own(x, p)) or masks[-1])  # type: ignore[arg-type]
    torch.manual_seed(2)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64) if case == "bias" else None
    A, B, c = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 8), (2, 6), (6,)))
    A.requires_grad_(case != "frozen A")
    if case == "a zero":
        c.data[2] = 0
    leaves = [t for t in (x, A, B, c) if t.requires_grad]
    p = 0.3 if case == "dropout" else 0.0

    def ends(y: Tensor) -> Tensor:
        y = y.view(15, 6)
        return y.div_(4.0) if case == "in place" else y / 4

    def fast(x: Tensor) -> Tensor:
        return ends(lowrank_linear(x * x.sigmoid(), W, b, A, B, 0.7, p, c))

    def plain(x: Tensor) -> Tensor:
        h = x * x.sigmoid()
        low = h * kept_mask(masks[0], h) if p else h
        y = c * (functional.linear(h, W) + 0.7 * (low @ A.t()) @ B)
        return ends(y if b is None else y + b)

    got = grads_of(checkpoint(fast, x, use_reentrant=False) if case == "checkpointed" else fast(x), leaves)
    assert all(far(a, e) < 1e-12 for a, e in zip(got, grads_of(plain(x), leaves), strict=True))


@pytest.mark.parametrize("name", quick(["llama", "bert_cls", "vit"]))
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_dora_keeps_less_and_is_the_same(name: str, low: torch.dtype | None) -> None:
    model, batch = zoo.build(name), zoo.batch(name)
    put(model, "dora", sites="linear", r=3, head=False)
    model.train()
    found, sizes = [], []

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low is not None):
            return model(**batch).loss

    for on in (True, False):
        with fast_forms(on):
            found.append(passed(model, batch, low))
            sizes.append(saved_bytes(forward, model))
    if low is None:
        assert all(far(a, b) < 1e-6 for a, b in zip(*found, strict=True))
    else:
        full = passed(model, batch)
        errors = [np.mean([relative(a, b) for a, b in zip(f, full, strict=True)]) for f in found]
        assert errors[0] <= 1.2 * errors[1], errors
    assert sizes[0] <= (0.75 if name == "llama" else 0.86) * sizes[1], sizes  # the others have biases


def test_a_factor_costs_no_memory_where_the_output_is_kept_anyway() -> None:
    """A gate's output waits for the backward pass in any case; the factor's gradient is made from it."""
    x, W = torch.randn(64, 8), torch.randn(32, 8)
    A, B, c = (torch.randn(*s, requires_grad=True) for s in ((2, 8), (2, 32), (32,)))
    holder = nn.ParameterList([A, B, c, nn.Parameter(W), nn.Parameter(x)])
    sizes = [
        saved_bytes(
            lambda more=more: functional.silu(lowrank_linear(holder[4].detach(), W, None, A, B, 1.0, 0.0, more)).sum(),
            holder,
        )
        for more in (None, c)
    ]
    assert sizes[1] - sizes[0] < 64 * 32


@pytest.mark.parametrize("how", ["", "attention", "bf16", "twice"])
def test_a_scaled_input_is_rebuilt(how: str) -> None:
    """(IA)3 on the down projection: the product that it scales is made again, not kept."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    a, b = (torch.randn(2, 6, 4, 8).to(dtype).requires_grad_() for _ in range(2))
    s, W = torch.randn(8, requires_grad=True), torch.randn(5, 8).to(dtype)
    found, sizes = [], []

    def forward() -> Tensor:
        x = functional.scaled_dot_product_attention(a, b, b) if how == "attention" else functional.silu(a) * b
        y = functional.linear(scaled(x, s), W)
        return y + functional.linear(scaled(x, s), W) if how == "twice" else y

    for on in (True, False):
        with fast_forms(on):
            found.append(grads_of(forward(), [a, b, s]))
            sizes.append(saved_bytes(lambda: forward().sum(), nn.ParameterList([a, b, s])))
    assert all(
        x.dtype == y.dtype and far(x, y) < (0.02 if how == "bf16" else 1e-6) for x, y in zip(*found, strict=True)
    )
    assert sizes[0] <= sizes[1] - (0 if how == "attention" else a.numel() * a.element_size())


def test_ia3_keeps_less() -> None:
    model, batch = zoo.build("llama"), zoo.batch("llama")
    put(model, "ia3")
    model.train()
    found, sizes = [], []
    for on in (True, False):
        with fast_forms(on):
            found.append(passed(model, batch))
            sizes.append(saved_bytes(lambda: model(**batch).loss, model))
    assert all(far(a, b) < 1e-6 for a, b in zip(*found, strict=True))
    tokens = batch["input_ids"].numel()
    assert sizes[1] - sizes[0] == 2 * 4 * tokens * zoo.INNER * zoo.LAYERS  # the activation, and what it is rescaled in
