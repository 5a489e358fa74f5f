"""The fused low-rank product and its rebuilt inputs: gradients equal to plain autograd on any chain of operations."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import peftree
import zoo
from graft.helpers import far, put
from peftree.deltas import lowrank_linear
from peftree.deltas.rebuild import recipe
from peftree.evaluate.cost import saved_bytes

N, T, H, K = 2, 6, 3, 4  # rows, tokens, heads, head width
D = H * K


def attention(x: Tensor) -> Tensor:
    q = x.view(N, T, H, K).transpose(1, 2)
    return functional.scaled_dot_product_attention(q, q, q)


def scales(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype)


Step = Callable[[Tensor], Tensor]
STEPS: dict[str, Step] = {
    "gate": lambda x: x * x.sigmoid(),
    "norm": lambda x: scales(x) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)),
    "layer norm": lambda x: functional.layer_norm(x, (x.shape[-1],), scales(x), x.detach()[0, 0]),
    "layer norm, no bias": lambda x: functional.layer_norm(x, (x.shape[-1],), scales(x)),
    "layer norm, bare": lambda x: functional.layer_norm(x, (x.shape[-1],)),
    "layer norm of two axes": lambda x: functional.layer_norm(x, x.shape[1:], x.detach()[0], x.detach()[1]),
    "gelu": functional.gelu,
    "gelu, tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "relu": lambda x: functional.relu(x + 0.1),
    "half": lambda x: x * 0.5,
    "heads mixed": lambda x: x.reshape(N, T, H, K).transpose(1, 2).reshape(N, T, D),
    "tokens mixed": lambda x: x.reshape(N, T, D).transpose(1, 2).contiguous().view(N, T, D),
    "attention": lambda x: attention(x.reshape(N, T, D)).transpose(1, 2).reshape(N, T, D),
    "attention, heads not moved": lambda x: attention(x.reshape(N, T, D)).reshape(N, T, D),
    "gate of heads": lambda x: (x.reshape(N, T, H, K) * torch.linspace(1, 2, K)).view(N, T, D),
    "flat and back": lambda x: (x.reshape(N * T, D) * torch.linspace(1, 2, D)).view(N, T, D),
    "clone": lambda x: x.clone(),
    "in place": lambda x: x.clone().mul_(1.5),
    "add": lambda x: x + 1,
    "square": lambda x: x * x,
    "broadcast": lambda x: x * x.mean(1, keepdim=True),
    "transposed product": lambda x: (x.transpose(0, 1) * torch.linspace(1, 2, N)[None, :, None]).transpose(0, 1),
    "view then product": lambda x: torch.linspace(1, 2, D) * (x * x.sigmoid()).view(T, N, D).reshape(N, T, D),
}


@settings(max_examples=120)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5), st.integers(0, 3))
def test_gradients_equal_plain_autograd(names: list[str], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    start, W, b, A, B = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((N, T, D), (5, D), (5,), (2, D), (2, 5))
    )
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (start, A, B)]
        x = leaves[0]
        for name in names:
            x = STEPS[name](x)
        a, c = leaves[1:]
        y = lowrank_linear(x, W, b, a, c, 0.7) if fused else functional.linear(x, W, b) + 0.7 * (x @ a.t()) @ c
        (y / y.detach().abs().max()).sin().sum().backward()  # squares of squares grow
        results.append([y.detach(), *[t.grad for t in leaves]])
    assert all(far(a, b) < 1e-7 for a, b in zip(*results, strict=True)), names


NORMS = ["norm", "layer norm", "layer norm, no bias", "layer norm, bare"]  # multiplied with, never multiplied out
KNOWN = [*NORMS, "gate", "attention", "layer norm of two axes", "gelu", "gelu, tanh", "silu"]


@pytest.mark.parametrize("names", [*([n] for n in KNOWN), ["add"], ["gate", "heads mixed"], ["layer norm", "add"]])
def test_what_is_rebuilt_and_what_is_not(names: list[str]) -> None:
    x = torch.randn(N, T, D, requires_grad=True)
    for name in names:
        x = STEPS[name](x)
    found = recipe(x)
    assert (found is not None) == (names[-1] in KNOWN)
    if found is not None:
        again = found.remake(found.kept)
        assert far(again.detach(), x.detach()) < 1e-6 if "layer" in names[0] else torch.equal(again, x)
        left = torch.randn(x.numel() // x.shape[-1], 3)
        assert far(found.left_product(left, found.kept).detach(), left.t() @ x.detach().reshape(-1, x.shape[-1])) < 1e-4
        assert (found.gram is not None) == (names[0] in NORMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_norm_is_rebuilt_only_from_statistics_that_determine_it(dtype: torch.dtype, mixed: bool) -> None:
    x = torch.randn(N, T, D).to(dtype).requires_grad_()
    W, b = torch.linspace(0.5, 2, D), torch.linspace(-1, 1, D)
    if not mixed:
        W, b = W.to(dtype), b.to(dtype)
    elif dtype is torch.float64:
        return  # torch has no such norm
    y = functional.layer_norm(x, (D,), W, b)
    found = recipe(y)
    assert (found is None) == (dtype is torch.bfloat16 and not mixed)
    if found is not None:
        again = found.remake(found.kept)
        assert again.dtype == y.dtype and far(again.detach(), y.detach()) < (1e-2 if mixed else 1e-12)
        assert (found.gram is None) == mixed, "a thin product in half precision would cancel"


def test_a_norm_far_from_zero_keeps_the_gradient_precise() -> None:
    """The product that never makes the norm subtracts the mean late: no worse than the norm itself."""
    x = (torch.randn(64, D) + 300).requires_grad_()
    y = functional.layer_norm(x, (D,))
    found = recipe(y)
    assert found is not None
    left = torch.randn(64, 3)
    true = left.double().t() @ functional.layer_norm(x.detach().double(), (D,))
    plain, thin = (far(p.detach().double(), true) for p in (left.t() @ y, found.left_product(left, found.kept)))
    assert thin < 10 * plain


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_an_encoder_keeps_neither_its_norms_nor_its_activations(family: str) -> None:
    """Beside Hugging Face PEFT's LoRA on the same layers at most 0.8 of the bytes wait for the backward pass."""
    sizes = {}
    for library in ("ours", "theirs"):
        model = zoo.build(family).train()
        paths = [s.path for s in peftree.sites.resolve(model, "linear")]
        if library == "ours":
            put(model, "lora", sites="linear", r=2)
        else:
            peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=paths), model)
        sizes[library] = saved_bytes(lambda model=model: zoo.loss(family, model(**zoo.batch(family))), model)
    assert sizes["ours"] <= 0.8 * sizes["theirs"], sizes


def test_checkpointing_runs_every_layer_twice_and_no_more() -> None:
    """Looking for a way back must not unpack the checkpoints of the forward pass."""
    model = zoo.build("llama").train()
    adapter = put(model, "lora", sites="linear")
    counts = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        calls = []
        handles = [
            m.self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)) for m in model.model.layers
        ]
        model(**zoo.batch("llama")).loss.backward()
        counts.append(len(calls))
        for handle in handles:
            handle.remove()
    assert counts == [zoo.LAYERS, 2 * zoo.LAYERS]
    assert all(p.grad is not None for p in adapter.parameters())


def test_second_derivatives_are_refused_not_wrong() -> None:
    x, W = torch.randn(3, 4), torch.randn(5, 4)
    A, B = torch.randn(2, 4, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    y = lowrank_linear(x, W, None, A, B, 1.0)
    (g,) = torch.autograd.grad(y.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_function_transforms_take_the_plain_path(method: str) -> None:
    model = zoo.build("llama")
    adapter = put(model, method)
    own = {n: p for n, p in model.named_parameters() if ".deltas." in n}
    batch = zoo.batch("llama")

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (), batch).loss

    got = torch.func.grad(loss)({n: p.detach() for n, p in own.items()})
    model(**batch).loss.backward()
    assert all(far(got[n], p.grad) < 1e-5 for n, p in own.items()) and len(own) == len(adapter.parameters())
    peftree.detach(model)
