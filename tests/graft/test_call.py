"""What a run knows is its own: other threads, asyncio tasks, and layers that are run again in the backward pass."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftree
import zoo
from graft.helpers import put, run

KINDS = ("lora", "prompt_tuning", "prefix_tuning", "parallel_adapter")


def mixed(name: str = "llama", kinds: tuple[str, ...] = KINDS) -> nn.Module:
    """A model with one adapter of each kind, all far from their start."""
    model = zoo.build(name)
    for seed, kind in enumerate(kinds):
        put(model, kind, name=kind, seed=seed, std=0.3)
    return model


def tasks(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The output with each adapter alone."""
    out = {}
    for kind in peftree.adapters(model):
        with peftree.route(model, [kind] * len(zoo.batch(name)["input_ids"])):
            out[kind] = run(name, model)
    return out


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_threads_route_apart(name: str) -> None:
    model = mixed(name)
    rows, want, wrong = len(zoo.batch(name)["input_ids"]), tasks(model, name), []
    assert min(float((want[k] - want["lora"]).abs().max()) for k in KINDS[1:]) > 1e-3
    start = threading.Barrier(len(KINDS))

    def work(kind: str) -> None:
        start.wait()
        for _ in range(12):
            with peftree.route(model, [kind] * rows):
                wrong.extend([kind] * (not torch.allclose(run(name, model), want[kind], atol=1e-6)))

    threads = [threading.Thread(target=work, args=(kind,)) for kind in KINDS]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_asyncio_tasks_route_apart() -> None:
    model = mixed()
    want = tasks(model, "llama")
    peftree.switch(model, None)
    want["base"] = run("llama", model)

    async def work(kind: str) -> bool:
        right = True
        for _ in range(4):
            block = peftree.disabled(model) if kind == "base" else peftree.route(model, [kind] * 3)
            with block:
                await asyncio.sleep(0)
                right = right and torch.allclose(run("llama", model), want[kind], atol=1e-6)
        return right

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*[work(kind) for kind in want])

    assert all(asyncio.run(all_of_them()))


def test_a_run_keeps_to_what_it_began_with() -> None:
    """A switch from elsewhere while layers run takes effect in the next run."""
    model = mixed(kinds=("lora", "ia3"))
    peftree.switch(model, "lora")
    want = run("llama", model)
    hook = model.model.layers[0].register_forward_hook(lambda *_: _elsewhere(lambda: peftree.switch(model, "ia3")))
    assert torch.equal(run("llama", model), want)
    hook.remove()
    assert peftree.active(model) == ("ia3",)
    assert not torch.equal(run("llama", model), want)


def _elsewhere(do: Callable[[], Any]) -> None:
    thread = threading.Thread(target=do)
    thread.start()
    thread.join()


def test_blocks_and_switches_inside_a_run() -> None:
    """A model that turns its own adapters off for a part of its forward gets what it asks for."""
    model = mixed(kinds=("lora",))
    peftree.switch(model, None)
    base = run("llama", model)
    peftree.switch(model, "lora")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = zoo.build("llama")

        def forward(self, **batch: Any) -> tuple[Tensor, Tensor]:
            on = self.lm(**batch).logits
            with peftree.disabled(self):
                return on, self.lm(**batch).logits

    both = Both().eval()
    put(both, "lora", seed=0, std=0.3)
    with torch.no_grad():
        on, off = both(**zoo.batch("llama"))
    assert torch.equal(off, base) and not torch.allclose(on, base, atol=1e-3)
    with peftree.disabled(model):
        assert torch.equal(run("llama", model), base) and peftree.active(model) == ()
        peftree.switch(model, "lora")
        assert peftree.active(model) == ("lora",) and not torch.equal(run("llama", model), base)
    assert peftree.active(model) == ("lora",)


def _switched(model: nn.Module) -> None:
    peftree.switch(model, "b")


def _off(model: nn.Module) -> None:
    peftree.switch(model, None)


def _another(model: nn.Module) -> None:
    put(model, "prompt_tuning", name="new", std=0.3)


def _gone(model: nn.Module) -> None:
    peftree.detach(put(model, "lora", name="new").model, "new")


def gradients(name: str, how: str, between: Callable[[nn.Module], Any], kinds: tuple[str, str]) -> list[Tensor]:
    """Gradients of a loss over two passes with two adapters, something happening between them and the backward."""
    model = zoo.build(name)
    ours = [put(model, kind, name=n, seed=i, std=0.2) for i, (n, kind) in enumerate(zip("ab", kinds, strict=True))]
    model.train()
    if how in ("reentrant", "plain"):
        model.activation_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    if how == "own":
        layer: Any = (model.bert.encoder.layer if name == "bert_cls" else model.model.layers)[1]
        whole = layer.forward
        layer.forward = lambda *args, **kw: checkpoint(whole, *args, use_reentrant=False, **kw)
    outs = []
    for n in "ab":
        peftree.switch(model, "a")
        with peftree.route(model, [n, n, n]) if n == "b" else contextlib.nullcontext():
            outs.append(
                zoo.output(name, model(**zoo.batch(name), **({} if name == "bert_cls" else {"use_cache": False})))
            )
    between(model)
    (outs[0] - outs[1]).pow(2).mean().backward()
    return [p.grad for a in ours for p in a.parameters() if p.grad is not None]


CASES: list[tuple[str, Callable[[nn.Module], Any], tuple[str, str]]] = [
    ("llama", _switched, ("lora", "lora")), ("llama", _off, ("lora", "ia3")), ("llama", _another, ("lora", "dora")),
    ("llama", _off, ("prompt_tuning", "lora")), ("llama", _switched, ("prefix_tuning", "parallel_adapter")),
    ("bert_cls", _another, ("prompt_tuning", "lora")), ("llama", _gone, ("lora", "prefix_tuning")),
]  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "reentrant", "own"])
@pytest.mark.parametrize(("name", "between", "kinds"), CASES)
def test_layers_run_again_as_they_ran(
    name: str, how: str, between: Callable[[nn.Module], Any], kinds: tuple[str, str]
) -> None:
    want, got = gradients(name, "none", between, kinds), gradients(name, how, between, kinds)
    assert len(want) == len(got) > 4
    assert max(float((w - g).norm() / (w.norm() + 1e-12)) for w, g in zip(want, got, strict=True)) < 1e-5


def test_layers_run_again_in_another_thread() -> None:
    """The backward pass of an accelerator runs in a thread of its own, after the block was left."""
    model = zoo.build("llama")
    adapters = [put(model, "lora", name=n, seed=i, std=0.3) for i, n in enumerate("ab")]
    peftree.switch(model, None)
    found = []
    for checkpointed in (False, True):
        model.train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with peftree.route(model, ["a", "b", None]):
            loss = model(**zoo.batch("llama")).loss
        _elsewhere(loss.backward)
        found.append([p.grad.clone() for a in adapters for p in a.parameters()])
        [a.model.zero_grad() for a in adapters]
    assert max(float((w - g).abs().max()) for w, g in zip(*found, strict=True)) < 1e-6
    assert min(float(w.abs().max()) for w in found[0]) > 0
