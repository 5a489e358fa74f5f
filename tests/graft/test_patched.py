"""Modules whose `forward` is an attribute of the instance: the graft is reached whoever patches what, and when."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from torch.nn import functional

import peftree
import zoo
from graft.helpers import far, put, run

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"sites": "linear embed"}, "dora": {}, "ia3": {}, "prefix_tuning": {"length": 3}, "parallel_adapter": {},
    "prompt_tuning": {"length": 3}, "full": {"sites": "norm"}, "lst": {},
}  # fmt: skip


def hook(model: nn.Module) -> None:
    """What accelerate does to a model that is spread over several devices."""
    for module in [m for n, m in model.named_modules() if "deltas" not in n]:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def unhook(model: nn.Module) -> None:
    for module in [m for n, m in model.named_modules() if "deltas" not in n]:
        remove_hook_from_module(module)


def plain(method: str) -> tuple[Tensor, Tensor]:
    model = zoo.build("llama")
    base = run("llama", model)
    put(model, method, std=0.3, **METHODS[method])
    return run("llama", model), base


@pytest.mark.parametrize("method", METHODS)
def test_hooked_before_and_after(method: str) -> None:
    want, base = plain(method)
    assert far(want, base) > 1e-3
    before = zoo.build("llama")
    hook(before)
    attributes = [sorted(m.__dict__) for m in before.modules()]
    put(before, method, std=0.3, **METHODS[method])
    assert torch.equal(run("llama", before), want)
    assert torch.equal(run("llama", copy.deepcopy(before)), want)
    after = zoo.build("llama")
    put(after, method, std=0.3, **METHODS[method])
    hook(after)
    for _ in range(2):
        assert torch.equal(run("llama", after), want)
    for model in (before, after):
        twin = copy.deepcopy(model)
        unhook(twin)
        assert torch.equal(run("llama", twin), want)
        peftree.detach(twin)
        assert torch.equal(run("llama", twin), base)
        peftree.detach(model)
        assert torch.equal(run("llama", model), base)
        assert [sorted(m.__dict__) for m in model.modules()] == attributes
        assert all(m._old_forward.__func__ is type(m).forward for m in model.modules())
        assert [type(m) for m in model.modules()] == [type(m) for m in zoo.build("llama").modules()]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "parallel_adapter"])
def test_offloaded_weights(method: str) -> None:
    """Weights that lie elsewhere until their module runs."""
    want, _ = plain(method)
    fields = METHODS[method] if method != "lora" else {"sites": "linear embed"}
    model = zoo.build("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    adapter = put(model, method, std=0.3, **fields)
    assert not any(p.is_meta for p in adapter.parameters())
    assert far(run("llama", model), want) < 1e-6
    model(**zoo.batch("llama")).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby"])
def test_layers_on_disk(method: str, tmp_path: Path) -> None:
    """As a device map of `from_pretrained` puts them there."""
    model: Any = zoo.build("llama")
    model.save_pretrained(tmp_path / "model")
    put(model, method, std=0.3)
    want = run("llama", model)
    there = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    there |= {"model.rotary_emb": "cpu"} | {f"model.layers.{i}": "disk" for i in range(1, len(model.model.layers))}
    held = type(zoo.build("llama")).from_pretrained(tmp_path / "model", device_map=there, offload_folder=tmp_path / "w")
    adapter = put(held.eval(), method, std=0.3)
    assert held.model.layers[1].self_attn.q_proj._parameters["weight"].is_meta
    assert far(run("llama", held), want) < 1e-6
    assert not adapter.graft.shared.outside, "what accelerate moves is not computed with"
    held(**zoo.batch("llama")).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())


def _tripled(self: Any, x: Tensor) -> Tensor:
    return 3 * functional.linear(x, self.weight, self.bias)


class Caller:
    """A patch that is an object."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = 3 * self.inner(x)
        return out


def _hidden(inner: Any) -> Any:
    """A patch that nobody can look into."""
    table = [[[[inner]]]]
    return functools.partial(lambda at, x: 3 * table[at][0][0][0](x), 0)


def _wrapped(inner: Any) -> Any:
    @functools.wraps(inner)
    def forward(x: Tensor) -> Tensor:
        out: Tensor = 3 * inner(x)
        return out

    return forward


WAYS: dict[str, Callable[[Any], Any]] = {
    "closure": lambda inner: lambda x: 3 * inner(x), "wraps": _wrapped, "object": Caller, "hidden": _hidden,
    "twice": lambda inner: _wrapped(lambda x: inner(x)),
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "dora", "full", "ia3"])
@pytest.mark.parametrize("way", WAYS)
def test_patches_around_an_adapted_module(way: str, method: str) -> None:
    """`f(adapted(x))` where the patch came after the adapter, and the adapter comes back when it goes."""
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    adapter = peftree.adapt(module, method, sites="0")
    with torch.no_grad():
        [p.add_(torch.randn(p.shape)) for p in adapter.parameters()]
    want, base = module[0](x), functional.linear(x, module[0].weight, module[0].bias)
    before = module[0].forward
    module[0].forward = WAYS[way](before)
    for _ in range(3):
        assert torch.allclose(module[0](x), 3 * want, atol=1e-5)
    module[0].forward = before
    assert "forward" not in vars(module[0]) and torch.allclose(module[0](x), want, atol=1e-6)
    module[0].forward = WAYS[way](before)
    del module[0].forward
    assert torch.allclose(module[0](x), want, atol=1e-6) and not torch.allclose(want, base, atol=1e-2)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_patches_that_replace_a_forward(when: str, method: str) -> None:
    """What runs instead of the module's own forward is what the adapter changes."""
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
    x = torch.randn(3, 6)

    def patch() -> None:
        module[0].forward = MethodType(_tripled, module[0])

    patch() if when == "before" else None
    adapter = peftree.adapt(module, method, sites="0")
    patch() if when == "after" else None
    with torch.no_grad():
        [p.add_(torch.randn(p.shape)) for p in adapter.parameters()]
    got = module[0](x)
    with peftree.disabled(module):
        assert torch.allclose(module[0](x), _tripled(module[0], x))
    peftree.merge(module)
    changed = functional.linear(x, module[0].weight, module[0].bias)
    peftree.unmerge(module)
    base = functional.linear(x, module[0].weight, module[0].bias)
    assert torch.allclose(got, 3 * changed, atol=1e-4) and not torch.allclose(changed, base, atol=1e-2)
    peftree.detach(module)
    assert torch.allclose(module[0](x), 3 * base) and module[0].__dict__["forward"].__func__ is _tripled


def test_the_whole_model_is_patched() -> None:
    """As accelerate does for mixed precision: twice, each around the last."""
    model = zoo.build("bert_cls")
    put(model, "prompt_tuning", std=0.3)
    want = run("bert_cls", model)
    first = model.forward
    model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(first.__func__), model)
    model.forward = MethodType(functools.wraps(first.__func__)(_again(model.forward.__func__)), model)
    got = run("bert_cls", model)
    assert got.dtype == torch.bfloat16 and far(got.float(), want) < 0.1
    model.forward = first
    assert torch.equal(run("bert_cls", model), want)


def _again(function: Any) -> Any:
    return lambda *args, **kwargs: function(*args, **kwargs)


class _Head(torch.autograd.Function):
    """A product that torch's own functions do not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x @ W.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, W = ctx.saved_tensors
        return grad @ W, grad.flatten(0, -2).mT @ x.flatten(0, -2)


@pytest.mark.parametrize(
    ("method", "fields"),
    [("loreft", {}), ("lora", {"sites": "lm_head attn.q"}), ("dora", {"sites": "lm_head"}), ("prompt_tuning", {})],
)
def test_a_patch_that_runs_parts_of_the_model(method: str, fields: dict[str, Any]) -> None:
    """A fused head runs the stack without labels and takes the head's weight; the run is that of the whole model."""
    model: Any = zoo.build("llama")
    adapter = put(model, method, std=0.3, **fields)
    batch = {k: v for k, v in zoo.batch("llama").items() if k != "labels"}
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    model.train()
    want = model(**batch, labels=labels).logits
    want.square().mean().backward()
    gradients = [p.grad.clone() for p in adapter.parameters()]

    def fused(self: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        x = self.model(**kwargs).last_hidden_state
        out: Tensor = _Head.apply(x.to(self.lm_head.weight.dtype), self.lm_head.weight)
        return out

    model.forward = MethodType(functools.wraps(type(model).forward)(fused), model)
    for parameter in adapter.parameters():
        parameter.grad = None
    got = model(**batch, labels=labels)
    assert torch.allclose(got, want, atol=1e-5)
    got.square().mean().backward()
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, atol=1e-5)
    assert not adapter.unused()
    del model.forward
    assert torch.allclose(model(**batch, labels=labels).logits, want, atol=1e-6)
