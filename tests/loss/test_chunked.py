"""The loss of a linear head in chunks equals torch's cross-entropy of its logits, with the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from peftree.errors import AdapterError
from peftree.loss import chunked, token_losses
from peftree.loss.chunked import Head, Step

STEPS: dict[str, tuple[Step, ...]] = {
    "plain": (),
    "scaled": (Step("mul", 0.25),),
    "divided": (Step("div", 8.0), Step("to", torch.float32)),
    "capped": (Step("div", 3.0), Step("tanh"), Step("mul", 3.0)),
    "twice": (Step("tanh"), Step("mul", 2.0), Step("tanh"), Step("div", 0.5)),
}


def _whole(hidden: Tensor, head: Head, targets: Tensor, smoothing: float) -> Tensor:
    z = functional.linear(hidden, head.weight, head.bias)
    for step in head.steps:
        z = z.to(step.value) if step.name == "to" else getattr(z, step.name)(*([step.value] if step.value else []))
    return functional.cross_entropy(z.float(), targets, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("steps", STEPS)
def test_value_and_gradient_are_those_of_whole_logits(
    steps: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "rows", lambda *_: 4)  # three chunks, the last a part of one
    hidden, weight, bias = torch.randn(16, 8), torch.randn(50, 8), torch.randn(50)
    head = Head(weight, bias, torch.float32, STEPS[steps])
    places, targets = torch.randperm(16)[:11], torch.randint(50, (11,))
    upstream = torch.rand(11)
    gradients, values = [], []
    for found in (
        lambda h: token_losses(h, head, places, targets, smoothing),
        lambda h: _whole(h[places], head, targets, smoothing),
    ):
        given = hidden.clone().requires_grad_()
        values.append(found(given))
        (values[-1] * upstream).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_an_added_tensor_and_a_product_in_bfloat16() -> None:
    hidden, weight, more = torch.randn(9, 16), torch.randn(40, 16), torch.randn(40)
    head = Head(weight, None, torch.bfloat16, (Step("add", more.bfloat16()), Step("to", torch.float32)))
    targets, given = torch.randint(40, (9,)), hidden.clone().requires_grad_()
    loss = token_losses(given, head, torch.arange(9), targets).mean()
    loss.backward()
    other = hidden.clone().requires_grad_()
    z = functional.linear(other.bfloat16(), weight.bfloat16()) + more.bfloat16()
    wanted = functional.cross_entropy(z.float(), targets)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    assert given.grad is not None and other.grad is not None
    assert float((given.grad - other.grad).norm()) < 0.01 * float(other.grad.norm())  # bfloat16 has 8 bits


def test_extreme_logits_and_a_single_chunk() -> None:
    """Probabilities that float32 cannot hold: a softmax's logarithm would be infinite."""
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    head = Head(torch.tensor([[300.0, 0.0], [-300.0, 0.0], [0.0, 1.0]]), None, torch.float32)
    losses = token_losses(hidden, head, torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert losses.tolist() == [600.0, 0.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_no_gradient_is_computed_where_none_is_wanted(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    own = chunked._chunk
    monkeypatch.setattr(chunked, "_chunk", lambda *a: kept.append(a[-1]) or own(*a))
    hidden, head = torch.randn(5, 4, requires_grad=True), Head(torch.randn(7, 4), None, torch.float32)
    with torch.no_grad():
        assert not token_losses(hidden, head, torch.arange(5), torch.arange(5), smoothing).requires_grad
    assert kept == [None]


def test_nothing_to_predict() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    losses = token_losses(hidden, Head(torch.randn(7, 4), None, torch.float32), none, none)
    losses.sum().backward()
    assert losses.shape == (0,) and hidden.grad is not None and not hidden.grad.any()


def test_chunks_are_as_large_as_memory_allows_but_not_tiny() -> None:
    cpu = torch.device("cpu")
    assert chunked.rows(49152, cpu) == 128 and chunked.rows(1 << 20, cpu) == 128 and chunked.rows(6144, cpu) == 1024
    assert chunked.rows(49152, torch.device("meta")) > 128


def test_a_second_derivative_is_refused() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    losses = token_losses(hidden, Head(torch.randn(7, 4), None, torch.float32), torch.arange(3), torch.arange(3))
    with pytest.raises(AdapterError, match="chunked_loss=false"):
        torch.autograd.grad(losses.sum(), hidden, create_graph=True)


def test_a_trace_needs_two_chunks_at_most() -> None:
    assert chunked.spans(0, 4) == chunked.spans(0, 4, True) == []
    assert chunked.spans(9, 4) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert chunked.spans(9, 4, True) == [slice(0, 4), slice(0, 4)] == chunked.spans(5, 4, True)
    assert chunked.spans(4, 4, True) == [slice(0, 4)]
