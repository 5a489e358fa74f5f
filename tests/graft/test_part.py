"""The frozen maps of a sub-layer as functions (decision 0015): what they compute, and whose they stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import peftree
import zoo
from graft.helpers import put, run
from peftree import sites
from peftree.deltas import Part, Place
from peftree.errors import AdapterError, MethodError

MIXTURES = ("mixtral", "qwen3_moe")
NONE = {"resnet", "convnext"}  # networks without such a sub-layer
FAMILIES = [name for name in zoo.ZOO if name not in {*MIXTURES, *NONE}]


def branches(model: nn.Module) -> list[Place]:
    found = [s for s in sites.tree(model) if s.kind == "branch"]
    return [Place(s, model, found, {}) for s in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_and_activation_are_all_that_the_network_does(name: str) -> None:
    """Oracle: the model's own pass, input and output of every feed-forward network seen by hooks."""
    model = zoo.build(name)
    seen: dict[str, list[Tensor]] = {}
    places = branches(model)
    assert places
    for place in places:
        site = place.site
        assert site.source is not None
        row = seen.setdefault(site.name, [])
        model.get_submodule(site.source).register_forward_pre_hook(lambda m, a, row=row: row.append(a[0]))
        model.get_submodule(site.path).register_forward_hook(lambda m, a, y, row=row: row.append(y))
    with torch.no_grad():
        model(**zoo.batch(name))
        for place in places:
            if not (row := seen[place.site.name]):
                continue  # a layer whose output nobody asked for
            x, y = row[:2]
            roles = {s.role for s in place.site.parts}
            first = place.part("ffn.act")(place.part("ffn.gate" if "ffn.gate" in roles else "ffn.up")(x))
            h = first * place.part("ffn.up")(x) if "ffn.gate" in roles else first
            torch.testing.assert_close(place.part("ffn.down")(h), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_stacks_of_experts_have_no_single_map(name: str) -> None:
    before = zoo.build(name)
    with pytest.raises(MethodError, match=r"text:ffn@0 .* has no single ffn\.gate .*stacked experts"):
        peftree.adapt(before, "mixlora")
    assert not peftree.adapters(before)
    place = Place(next(s for s in sites.tree(before) if s.role == "attn.q"), before, [], {})
    for role in ("ffn.up", "ffn.act", "ffn.router"):
        with pytest.raises(MethodError, match=f"attn.q@0 .* has no single {role}"):
            place.part(role)


@pytest.mark.parametrize("name", ["BitNet", "Segformer"])
def test_a_network_with_weights_between_its_maps_is_refused(name: str) -> None:
    """A norm, or a convolution, lies before the last map: what experts change would go around it."""
    sizes: dict[str, Any] = {"BitNet": zoo.LLAMA, "Segformer": {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16]}}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes[name]))
    with pytest.raises(MethodError, match=r"ffn@0 .* has no single ffn\.act"):
        peftree.adapt(model, "mixlora", sites="ffn")


def test_a_function_that_is_no_module_is_refused() -> None:
    model = zoo.build("llama")
    del model.model.layers[1].mlp.act_fn
    model.model.layers[1].mlp.act_fn = functional.silu
    with pytest.raises(MethodError, match=r"text:ffn@1 .* has no single ffn\.act"):
        peftree.adapt(model, "mixlora")
    peftree.adapt(model, "mixlora", layers="0", experts=3)


def test_the_activation_is_the_one_nearest_to_the_map() -> None:
    """A gate of the layer's own is none of the network's."""
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.gate = nn.Sigmoid()
    for place, layer in zip(branches(model), model.model.layers, strict=True):
        assert place.part("ffn.act").module is layer.mlp.act_fn


def test_other_deltas_leave_the_maps_alone() -> None:
    """Also under a patched forward, in a route and for one module that is a map and the end of the sub-layer (OPT)."""
    for name in ("llama", "opt", "gpt2", "phi3"):
        model = zoo.build(name)
        place = branches(model)[0]
        part = place.part("ffn.down")
        x = torch.randn(2, 3, part.site.in_features)
        want = part(x)
        put(model, "lora", name="a", sites="ffn.up ffn.down", std=0.5)
        assert torch.equal(part(x), want)
        inner = part.module.forward
        part.module.forward = lambda x, inner=inner: inner(x)
        run(name, model)
        assert torch.equal(part(x), want)


def test_a_patched_map_that_ends_its_sub_layer() -> None:
    """What runs instead of OPT's last map is the frozen map: three times its output is three times its weights."""
    patched, plain = zoo.build("opt"), zoo.build("opt")
    for module in (m for m in patched.modules() if "fc2" in m._modules):
        module.fc2.forward = lambda x, m=module.fc2: 3 * functional.linear(x, m.weight, m.bias)
    with torch.no_grad():
        for module in (m for m in plain.modules() if "fc2" in m._modules):
            module.fc2.weight.mul_(3), module.fc2.bias.mul_(3)
    base = run("opt", plain)
    for model in (patched, plain):
        put(model, "mixlora", experts=3, sites="ffn", std=0.3)
    want = run("opt", plain)
    assert (want - base).abs().max() > 1e-2
    for _ in range(2):
        torch.testing.assert_close(run("opt", patched), want, rtol=1e-4, atol=1e-5)


def test_a_map_that_runs_for_a_delta_keeps_no_input() -> None:
    """OPT's first map opens the sub-layer: what the branch was to read would hold the graph of the step."""
    model = zoo.build("opt")
    part = branches(model)[0].part("ffn.up")
    adapter = put(model, "parallel_adapter", size=4)
    cells = [cell for _, _, hub in adapter.graft.hubs() for cell in hub.cells if hub.path == part.site.path]
    run("opt", model)
    part(torch.randn(2, 3, zoo.HIDDEN, requires_grad=True))
    assert cells and all(cell.value is None for cell in cells)


@pytest.mark.parametrize("name", ["llama", "opt", "bert_cls"])
def test_nothing_of_the_base_is_saved_or_counted(name: str, tmp_path: Any) -> None:
    model = zoo.build(name)
    own = {id(p) for p in model.parameters()}
    adapter = put(model, "mixlora", name="a", experts=3, std=0.3)
    assert not own & {id(p) for p in adapter.parameters()}
    assert not [n for n, _ in model.named_modules() if "deltas." in n and isinstance(_, nn.Linear)]
    parts = [p for d in adapter.deltas.values() for m in d.modules() for p in vars(m).values() if isinstance(p, Part)]
    here = dict(model.named_modules())
    assert parts and all(here[p.site.path] is p.module for p in parts)
    want = run(name, model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(run(name, twin), want)
    twin.double()
    assert (run(name, twin).float() - want).abs().max() < 1e-4
    peftree.save(twin.float() and peftree.adapters(twin)["a"], tmp_path / "a")
    fresh = zoo.build(name)
    peftree.load(fresh, tmp_path / "a")
    assert (run(name, fresh) - want).abs().max() < 1e-5


def test_a_map_in_another_dtype_gets_what_it_takes() -> None:
    """T5 keeps `wo` in float32 where the rest is half, and casts for it."""
    model = zoo.build("t5").bfloat16()
    for module in model.modules():
        if "wo" in module._modules:
            module.wo.float()
    want = run("t5", model)
    adapter = peftree.adapt(model, "mixlora", sites="ffn", experts=3)
    assert (run("t5", model) - want).abs().max() < 0.05
    model.train()(**zoo.batch("t5")).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


def test_a_map_whose_weight_is_whole_numbers_gets_its_input_as_it_is() -> None:
    """A quantised map casts by itself: its input in the weight's own type would lose all behind the point."""

    class Quantised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)

    site = branches(zoo.build("llama"))[0].part("ffn.up").site
    module = Quantised(site.in_features, site.out_features)
    module.weight = nn.Parameter((module.weight * 100).to(torch.int8), requires_grad=False)
    x = torch.randn(2, 3, site.in_features)
    assert torch.equal(Part(module, site)(x), module(x))


def test_a_map_that_was_replaced_is_noticed(tmp_path: Any) -> None:
    model = zoo.build("llama")
    adapter = put(model, "mixlora", experts=3)
    model.model.layers[0].mlp.up_proj = nn.Linear(32, zoo.INNER, bias=False)
    with pytest.raises(AdapterError, match="up_proj"):
        peftree.save(adapter, tmp_path / "a")


def test_a_mixture_keeps_what_another_adapter_does() -> None:
    """Of the frozen network: both together change it by the sum of what each changes."""
    model = zoo.build("llama")
    put(model, "mixlora", name="a", experts=3, sites="ffn", std=0.3)
    put(model, "lora", name="b", sites="ffn.down", std=0.3)
    x, found = torch.randn(2, 3, 32), []
    with torch.no_grad():
        for names in (None, "a", "b", ["a", "b"]):
            peftree.switch(model, names)
            found.append(model.model.layers[0].mlp(x))
    none, a, b, both = found
    assert min((a - none).abs().max(), (b - none).abs().max()) > 1e-3
    torch.testing.assert_close(both - none, (a - none) + (b - none), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("whole", [False, True])
def test_perft_by_the_frozen_router(name: str, whole: bool) -> None:
    """PERFT-E against the router's weight and the rule of the family, by hand."""
    model = zoo.build(name)
    rule = {} if name == "mixtral" else {"norm_topk_prob": whole}
    for module in model.modules():
        vars(module).update({k: v for k, v in rule.items() if k in vars(module)})
    twin = copy.deepcopy(model)
    adapter = put(model, "perft", route="base", r=4, std=0.3)
    for _, site, delta in adapter.entries:
        block, f = twin.get_submodule(site.path), adapter.method

        def after(m: Any, a: Any, y: Tensor, t: Any = delta.terms, block: Any = block, f: Any = f) -> Tensor:
            p = functional.softmax(a[0] @ block.gate.weight.T, -1)
            lowest = p.sort(-1, descending=True).values[..., 1:2]
            p = p * (p >= lowest)
            p = p / p.sum(-1, keepdim=True) if whole or name == "mixtral" else p
            terms = [a[0] @ t.A[e * 4 : e * 4 + 4].T @ t.B[e * 4 : e * 4 + 4] for e in range(4)]
            return y + f.alpha / f.r * sum(p[..., e : e + 1] * z for e, z in enumerate(terms))

        block.register_forward_hook(after)
    got, want = run(name, model), run(name, twin)
    assert (got - want).abs().max() < 1e-5 and (got - run(name, zoo.build(name))).abs().max() > 1e-3
