"""LoRA on models that are not transformers': timm, diffusers, sentence-transformers, plain torch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foreign
import peftree
from foreign import SITES
from peftree.adapter import Adapter


def noisy(adapter: Adapter) -> Adapter:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return adapter


def dense(bare: nn.Module, adapter: Adapter) -> nn.Module:
    """Write `W + scale B A` into the weights of a bare copy."""
    for _, site, delta in adapter.entries:
        module = bare.get_submodule(site.path)
        change = delta.scale * delta.get_parameter("B").detach().T @ delta.get_parameter("A").detach()  # type: ignore[operator]
        W = module.get_parameter(site.parameter).detach().clone()
        rows = slice(*site.rows) if site.rows else slice(None)
        W[rows] += change.reshape(W[rows].shape)
        module.register_parameter(site.parameter, nn.Parameter(W))
    return bare


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@pytest.mark.parametrize("name", SITES)
def test_lora_is_the_dense_weights_and_survives_a_file(name: str, tmp_path: Path) -> None:
    model, run = foreign.build(name)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        base = run(model)
        adapter = noisy(peftree.adapt(model, "lora", sites=SITES[name], r=2, head=False))
        on = run(model)
        with peftree.disabled(model):
            assert torch.equal(run(model), base)
        right = run(dense(copy.deepcopy(bare), adapter))
        assert near(on, right) and (right - base).norm() > 50 * (right - on).norm()
        peftree.save(adapter, tmp_path / "adapter")
        peftree.merge(model)
        assert near(run(model), on)
        peftree.unmerge(model)
        peftree.detach(model)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), bare.state_dict().values(), strict=True)
        )
        peftree.load(bare, tmp_path / "adapter")
        assert torch.equal(run(bare), on)


@pytest.mark.parametrize("name", SITES)
def test_every_factor_gets_the_gradient_of_the_chain_rule(name: str) -> None:
    model, run = foreign.build(name)
    bare = copy.deepcopy(model)
    adapter = noisy(peftree.adapt(model, "lora", sites=SITES[name], r=2, head=False))
    written = dense(bare, adapter)
    for m in (model, written):
        run(m).pow(2).sum().backward()
    for key, site, delta in adapter.entries:
        grad = written.get_submodule(site.path).get_parameter(site.parameter).grad
        assert grad is not None, key
        dW = grad[slice(*site.rows) if site.rows else slice(None)].flatten(1)
        A, B = delta.get_parameter("A"), delta.get_parameter("B")
        for tensor, right in ((A, delta.scale * B @ dW), (B, delta.scale * A @ dW.T)):  # type: ignore[operator]
            assert tensor.grad is not None, key
            assert (tensor.grad - right).norm() <= 1e-3 * right.norm() + 1e-6, key


class _Halving(nn.Module):
    """Changes the output of its linear map in place, as Longformer's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.map(x)
        y /= 2
        return y


def test_an_output_may_be_changed_in_place() -> None:
    model = _Halving()
    bare, x = copy.deepcopy(model), torch.randn(2, 3, 6)
    adapter = noisy(peftree.adapt(model, "lora", sites="map", r=2))
    y = model(x)
    y.sum().backward()
    assert near(y.detach(), dense(bare, adapter)(x).detach())
    assert all(p.grad is not None for p in adapter.parameters())
