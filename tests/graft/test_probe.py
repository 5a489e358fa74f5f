"""The first run tells by name where an adapter has no effect; what is idle for a good reason is listed, not told."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from torch.nn import functional

import peftree
import zoo
from graft.helpers import put
from peftree import registry
from peftree.adapter import Adapter
from peftree.errors import AdapterError, MethodError, PeftreeWarning
from sampled import quick

X = torch.arange(24.0).sin().view(3, 8)


class Reader(nn.Module):
    """A layer that gets at the weight of its child in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.lin, self.rare, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how
        self.kept = self.lin.weight.t() if how == "kept" else None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and float(x.detach().sum()) > 1e6:  # a branch that data decides on
            x = self.rare(x)
        if self.how == "touched":  # what gives back its own operand computes nothing with it
            self.rare._parameters["weight"].requires_grad_(False)  # type: ignore[union-attr]
        if self.how in ("call", "touched"):
            out: Tensor = self.lin(x)
            return out
        if self.how == "read":
            return torch.einsum("...i,oi->...o", x, self.lin.weight[torch.arange(8)]) + self.lin.bias
        if self.how == "class":
            return nn.Linear.forward(self.lin, x)
        if self.how == "kept":
            return x @ self.kept
        weight = self.lin._parameters["weight"]
        assert weight is not None
        if self.how == "listed":
            return functional.linear(x, torch.stack([weight])[0])
        return functional.linear(x, weight.data if self.how == "data" else weight)


class Model(nn.Module):
    """A deep reader: its own parent is not adapted."""

    def __init__(self, how: str = "call") -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Sequential(Reader(how), nn.ReLU())])
        self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor, other: bool = False) -> Tensor:
        for layer in self.body:
            x = layer(x)
        out: Tensor = (self.other if other else self.head)(x)
        return out


PATH = "body.0.0.lin"


def told(model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
    """Run the model and return what it warned of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model(*args, **kwargs)
    assert all(w.category is PeftreeWarning for w in found)
    return [str(w.message) for w in found]


@pytest.mark.parametrize("how", ["params", "kept", "data", "listed"])
def test_a_weight_that_goes_around_the_graft_is_told_once_by_name(how: str) -> None:
    model = Model(how)
    adapter = put(model, "lora", sites=f"{PATH} head", std=1.0)
    (text,) = told(model, X)
    assert f"{PATH} has weights with which code other" in text and "head" not in text and "rare" not in text
    assert adapter.unused() == [PATH]
    assert told(model, X) == []
    more = put(model, "lora", name="b", sites=PATH)
    assert len(told(model, X)) == 1 and more.unused() == [PATH]


@pytest.mark.parametrize("how", ["call", "read", "class"])
def test_a_weight_that_the_graft_sees_is_not_told(how: str) -> None:
    model = Model(how)
    base = model(X).detach()
    adapter = put(model, "lora", sites=PATH, std=1.0)
    assert told(model, X) == [] and adapter.unused() == []
    assert float((model(X) - base).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("how", ["call", "touched"])
def test_a_branch_not_taken_is_listed_and_not_told(how: str) -> None:
    model = Model(how)
    adapter = put(model, "lora", sites="linear")
    assert told(model, X) == [] and adapter.unused() == ["body.0.0.rare", "other"]
    assert told(model, X, other=True) == [] and adapter.unused() == ["body.0.0.rare"]
    assert told(model, X * 0 + 1e7) == [] and adapter.unused() == []


def test_a_module_replaced_after_adapting_is_told() -> None:
    model = Model()
    adapter = put(model, "lora", sites=f"{PATH} head")
    model.body[0][0].lin = nn.Linear(8, 8)  # type: ignore[index,union-attr]
    assert f"{PATH} was replaced" in told(model, X)[0] and adapter.unused() == [PATH]


def test_a_module_that_was_wrapped_is_not_told() -> None:
    model = Model()
    adapter = put(model, "lora", sites=f"{PATH} head")
    model.head = nn.Sequential(model.head)
    model.body[0][0].lin = nn.Sequential(model.body[0][0].lin)  # type: ignore[index,union-attr]
    assert told(model, X) == [] and adapter.unused() == []
    llama = zoo.build("llama")
    inner: Any = peftree.adapt(llama, "lora").model
    inner.model = nn.ModuleDict({"_inner": inner.model})  # as FSDP and checkpointing wrap
    inner.model.forward = inner.model["_inner"].forward
    assert told(llama, **zoo.batch("llama")) == []
    inner.model = zoo.build("llama").model
    with pytest.raises(AdapterError, match="model of the model"):
        llama(**zoo.batch("llama"))


def test_a_forward_put_on_the_instance() -> None:
    model, seen = Model(), []
    adapter = put(model, "lora", sites=PATH, std=1.0)
    layer: Any = model.body[0][0].lin  # type: ignore[index,union-attr]
    layer.forward = lambda x: seen.append(x) or functional.linear(x, layer.weight)
    assert told(model, X) == [] and seen and adapter.unused() == []
    model = Model()
    adapter = put(model, "lora", sites=PATH)
    layer = model.body[0][0].lin  # type: ignore[index,union-attr]
    vars(layer)["forward"] = lambda x: x * 2  # goes around torch's own attributes
    assert f"{PATH} has a different forward" in told(model, X)[0] and adapter.unused() == [PATH]


def test_a_class_that_was_changed() -> None:
    model = Model()
    put(model, "lora", sites=PATH)
    model.body[0][0].lin.__class__ = nn.Linear  # type: ignore[index,union-attr,assignment]
    assert f"{PATH} has a different forward or class" in told(model, X)[0]


def test_an_attention_that_goes_around_the_memory_is_told() -> None:
    model = zoo.build("llama")
    put(model, "prefix_tuning", length=2)
    first: Any = model.get_submodule("model.layers.0.self_attn")
    vars(first)["config"] = first.config.inner  # no longer names the graft's attention function
    (text,) = told(model, **zoo.batch("llama"))
    assert "model.layers.0.self_attn" in text and "layers.1" not in text


LEAD = {"deit": 2, "siglip": 0, "swin": 0, "idefics3": 0, "smolvlm": 0}  # tokens before the patches; in others 1


OTHERS = itertools.product(enumerate(zoo.ZOO), enumerate(m for m in registry.methods() if m != "lora"))
SIXTH = [(model, method) for (i, model), (j, method) in OTHERS if (i + j) % 6 == 0]  # each model and method in many


@pytest.mark.parametrize(("name", "method"), quick([*((name, "lora") for name in zoo.ZOO), *SIXTH], len(zoo.ZOO)))
def test_ordinary_runs_are_not_told(name: str, method: str) -> None:
    model = zoo.build(name)
    fields: dict[str, Any] = {"length": 3} if method == "dept" else {}  # its 60 tokens leave tiny models no room
    fields |= {"lead": LEAD.get(name, 1)} if method == "convpass" else {}
    fields |= {"frames": 3} if method == "mv_adapter" else {}  # one video
    fields |= {"sites": "conv" if name == "resnet" else "linear"} if method == "lora" else {}
    try:
        adapter = peftree.adapt(model, method, **fields)
    except peftree.PeftreeError:
        assert method != "lora"  # some families do not take some methods; other tests say which
        return
    if method == "mv_adapter" and name in LEAD and any(s.tower == "vision" for _, s, _ in adapter.entries):
        with pytest.raises(MethodError, match=r"are not \[CLS\] and a square grid"):
            model(**zoo.batch(name))
        return
    assert told(model, **zoo.batch(name)) == []
    tied = ("shared", "model.shared")  # tables of T5 and BART whose copies in the two stacks are what runs
    assert all("experts" in path or path in tied for path in adapter.unused())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_without_a_token(name: str) -> None:
    model = zoo.build(name)
    peftree.adapt(model, "lora", sites="ffn.down attn.q")
    assert told(model, torch.tensor([[9]])) == []


def test_towers_without_an_input() -> None:
    model: Any = zoo.build("llava")
    adapter = peftree.adapt(model, "lora", sites="*.q_proj *.linear_1")
    batch = zoo.batch("llama")
    assert told(model, **{k: v for k, v in batch.items() if k != "labels"}) == []
    assert adapter.unused() and all("vision" in path or "projector" in path for path in adapter.unused())
    model = zoo.build("t5")
    adapter = peftree.adapt(model, "lora", sites="linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(zoo.batch("t5")["input_ids"], max_new_tokens=3)
        model.generate(zoo.batch("t5")["input_ids"], max_new_tokens=3, num_beams=2)
    assert adapter.unused() == []
    model = zoo.build("bart").model.decoder
    adapter = peftree.adapt(model, "lora", sites="*.q_proj *.v_proj")
    assert told(model, input_ids=torch.tensor([[3, 4]])) == []
    assert all("encoder_attn" in path for path in adapter.unused())


def test_adapters_that_are_off_are_told_when_they_are_on() -> None:
    model = Model("params")
    adapter = put(model, "lora", sites=PATH)
    with peftree.disabled(model):
        assert told(model, X) == []
    peftree.switch(model, None)
    assert told(model, X) == [] and adapter.unused() == [PATH]
    with peftree.route(model, ["default", None, None]):
        assert len(told(model, X)) == 1


def test_a_failed_first_run_does_not_count() -> None:
    model = Model("params")
    put(model, "lora", sites=PATH)
    with pytest.raises(RuntimeError):
        model(torch.zeros(3, 5))
    assert len(told(model, X)) == 1


def test_towers_of_a_model_run_with_the_adapter_by_themselves() -> None:
    model = T.SiglipModel(
        T.SiglipConfig(text_config=zoo.CLIP_TEXT | {"vocab_size": 64}, vision_config=zoo.IMAGE_SHAPE)
    ).eval()
    pixels = torch.randn(2, 3, zoo.PIXELS, zoo.PIXELS)
    base = model.get_image_features(pixels).pooler_output.detach()
    adapter = put(model, "lora", sites="vision_model.head.attention.out_proj", std=1.0)
    on = model.get_image_features(pixels).pooler_output.detach()
    peftree.merge(model)
    merged = model.get_image_features(pixels).pooler_output.detach()
    assert float((merged - base).abs().max()) > 1e-2 and float((on - merged).abs().max()) < 1e-5
    assert adapter.unused() == []


def test_two_threads_and_checkpointing() -> None:
    model: Any = zoo.build("llama").train()
    model.activation_checkpointing_enable()
    adapter = peftree.adapt(model, "lora", sites="linear")
    faults: list[str] = []

    def one() -> None:
        try:
            model(**zoo.batch("llama"), use_cache=False).logits.sum().backward()
        except BaseException as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and adapter.unused() == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_watch_for_themselves(how: Any) -> None:
    model = Model("params")
    put(model, "lora", sites=f"{PATH} head")
    twin = how(model)
    assert len(told(twin, X)) == 1 and len(told(model, X)) == 1
    assert told(how(twin), X) == []
    found: Adapter = peftree.adapters(twin)["default"]
    assert found.unused() == [PATH]


def test_a_compiled_run_is_not_watched_and_not_compiled_again() -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    model = Model()
    adapter = put(model, "lora", sites=f"{PATH} head")
    run: Any = torch.compile(model, backend=backend)
    got = [run(X) for _ in range(2)][-1].detach()
    assert adapter.unused() == [PATH, "head"]
    count = len(graphs)
    want = model(X).detach()  # the first run that is seen
    assert adapter.unused() == [] and float((got - want).abs().max()) < 1e-6
    run(X)
    assert len(graphs) == count


class Broken(Model):
    """Its code looks at values, so that it is compiled in pieces."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if x.detach().sum() > 1e6 else x)


def test_the_first_run_of_a_model_that_is_compiled_in_pieces() -> None:
    torch._dynamo.reset()
    model = Broken("call")
    put(model, "lora", sites=f"{PATH} head", std=1.0)
    want = copy.deepcopy(model)(X).detach()
    run: Any = torch.compile(model, backend="eager")
    assert told(run, X) == [] and torch.allclose(run(X), want)
    model = Broken("listed")
    put(model, "lora", sites=f"{PATH} head")
    assert len(told(torch.compile(model, backend="eager"), X)) == 1


def test_a_model_with_a_compiled_part() -> None:
    torch._dynamo.reset()
    model: Any = Model("call")
    put(model, "lora", sites=f"{PATH} head", std=1.0)
    want = copy.deepcopy(model)(X).detach()
    model.body[0] = torch.compile(model.body[0], backend="eager")
    assert told(model, X) == [] and torch.allclose(model(X), want)
    model = Model("call")
    put(model, "lora", sites=f"{PATH} head")
    model.head = torch.compile(model.head, backend="eager")  # a wrapper, not another module
    assert told(model, X) == []
