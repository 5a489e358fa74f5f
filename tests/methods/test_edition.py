"""What the contract says of layers, parts and tensors: a method twice, shares of the depth, frozen and elastic ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor, nn

import peftree
import zoo
from methods.test_parts import folder as folder
from peftree import registry, sites
from peftree.deltas import Bottleneck, LowRank, Reweight, lora_factors
from peftree.errors import MethodError, SiteError, StoreError
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags
from store import tools


def test_layers_are_those_of_a_stack_too() -> None:
    model = zoo.build("vit").eval()
    batch = zoo.batch("vit")
    shallow = peftree.adapt(model, "vpt", name="shallow", deep=False, head=False)
    deep = peftree.adapt(model, "vpt", name="first", layers="0", head=False)
    assert [p.shape for p in deep.parameters()] == [p.shape for p in shallow.parameters()]
    with torch.no_grad():
        deep.parameters()[0].copy_(shallow.parameters()[0])
        outs = [model(**batch).logits for name in ("shallow", "first") if peftree.switch(model, name) is None]
    assert torch.allclose(*outs, atol=1e-6)


@pytest.mark.parametrize(("key", "method"), [("vit", "vpt"), ("llama", "prompt_tuning"), ("llama", "lst")])
def test_a_layer_that_a_stack_method_needs_is_not_left_out_silently(key: str, method: str) -> None:
    model = zoo.build(key)
    with pytest.raises(MethodError, match=f"layers='1' leaves out layer 0 of .*, where {method} must act"):
        peftree.adapt(model, method, layers="1")
    assert not peftree.adapters(model)


def test_layers_by_share_of_the_depth() -> None:
    config = zoo.build("llama").config
    config.num_hidden_layers = 10
    model = type(zoo.build("llama"))(config)

    def layers(text: str) -> list[int | None]:
        return [s.layer for s in sites.resolve(model, "attn.q", text)]

    assert layers("0%-25%") == [0, 1, 2] and layers("25%-50%") == [3, 4] and layers("50%-75%") == [5, 6, 7]
    assert layers("75%:") == [8, 9] and layers("0%-10%,9") == [0, 9] and layers(":20%") == [0, 1]
    parts = [n for k in range(4) for n in layers(f"{25 * k}%-{25 * (k + 1)}%")]
    assert parts == list(range(10)), "shares that meet leave no layer out and take none twice"
    assert layers("0%-5%,92%-99%") == [0], "a share between two layers is left out beside another"
    for wrong in ("50%-200%", "92%-99%", "0%-5%,50%-20%"):
        with pytest.raises(SiteError, match="not all"):
            layers(wrong)


def test_the_groups_of_s4() -> None:
    """2, 4, 4 and 2 of 12 layers: adapters and low rank; and prefixes; and biases; prefixes, biases and low rank."""
    config = zoo.build("bert_cls").config
    config.num_hidden_layers = 12
    adapter = peftree.adapt(type(zoo.build("bert_cls"))(config), "s4", head=False)
    found: dict[int | None, set[str]] = {}
    for _, site, delta in adapter.entries:
        found.setdefault(site.layer, set()).add(adapter.method.member_names[delta.part])
    groups = [{"houlsby", "lora"}, {"houlsby", "prefix_tuning"}]
    groups += [groups[1] | {"bitfit"}, {"prefix_tuning", "bitfit", "lora"}]
    assert [found[i] for i in range(12)] == [g for g, n in zip(groups, (2, 4, 4, 2), strict=True) for _ in range(n)]


def test_a_recipe_may_name_a_method_twice(folder: Path) -> None:
    text = (
        "about: y = W x\npaper: none\nparts:\n- lora: {r: 2, layers: '0'}\n- lora: {r: 4, layers: '1', sites: attn.k}\n"
    )
    (folder / "twice.yaml").write_text(text)
    registry.methods.cache_clear()
    adapter = peftree.adapt(zoo.build("llama"), "twice")
    assert [(s.role, s.layer, d.A.shape[0]) for _, s, d in adapter.entries] == [
        ("attn.q", 0, 2), ("attn.v", 0, 2), ("attn.k", 1, 4),
    ]  # fmt: skip
    changed = registry.make("twice", {"lora_2": {"r": 1}})
    assert [part.r for part in changed.parts()] == [2, 1]  # type: ignore[attr-defined]
    assert registry.from_spec(registry.spec(changed)) == changed


class Half(Method):
    """Low-rank with A frozen, and ranks that training decides: after it only the rows of B that moved are kept."""

    name: ClassVar[str] = "half"
    tags: ClassVar[Tags] = Tags("reparameterized", "none", True, True, lr=1e-3)
    sites: str = Field("attn.q", description="where")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(4 * s.out_features for s in sites)

    def build(self, place: Place) -> Halved:
        A, B = lora_factors(place, 4)
        return Halved(place, A.requires_grad_(False), B, 1.0)

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            if isinstance(delta, Halved):
                kept = delta.B.abs().sum(1) > 0
                delta.A, delta.B = (nn.Parameter(t[kept], t.requires_grad) for t in (delta.A, delta.B))


class Halved(LowRank):
    """Its two tensors shrink together."""

    elastic: ClassVar[tuple[str, ...]] = ("A", "B")


@pytest.fixture
def half() -> Iterator[str]:
    registry.methods()["half"] = Half
    yield "half"
    registry.methods().pop("half")


def test_what_a_method_keeps_frozen_stays_frozen(half: str) -> None:
    adapter = peftree.adapt(zoo.build("llama"), half)
    before = [p.requires_grad for p in adapter.parameters()]
    assert set(before) == {True, False}
    assert not any(p.requires_grad for p in adapter.requires_grad(False).parameters())
    assert [p.requires_grad for p in adapter.requires_grad(True).parameters()] == before


def test_sizes_that_training_decided_come_back(half: str, tmp_path: Path) -> None:
    model = zoo.build("llama").eval()
    adapter = peftree.adapt(model, half)
    for number, delta in enumerate(d for d in adapter.deltas.values() if isinstance(d, Halved)):
        delta.B.data[: number + 1].normal_()
    adapter.finish()
    assert [d.A.shape[0] for d in adapter.deltas.values() if isinstance(d, Halved)] == [1, 2]
    peftree.save(adapter, tmp_path / "a")
    fresh = zoo.build("llama").eval()
    back = peftree.load(fresh, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(fresh(**zoo.batch("llama")).logits, model(**zoo.batch("llama")).logits)
    assert [p.requires_grad for p in back.requires_grad().parameters()] == [
        p.requires_grad for p in adapter.parameters()
    ]


class InLayer(Method):
    """A bottleneck on what a whole layer, or a whole attention, gives."""

    name: ClassVar[str] = "in_layer"
    tags: ClassVar[Tags] = Tags("additive", "none", True, False, lr=1e-3)
    sites: str = Field("layer", description="where")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(9 * s.out_features + 4 for s in sites)

    def build(self, place: Place) -> Bottleneck:
        return Bottleneck(place, 4)


@pytest.mark.parametrize("where", ["layer", "attn", "layer attn"])
@pytest.mark.parametrize("key", ["llama", "bert_cls", "vit", "gpt2"])
def test_rows_are_routed_where_a_module_returns_a_tuple(key: str, where: str) -> None:
    model = zoo.build(key).eval()
    batch = {k: v[:3] for k, v in zoo.batch(key).items() if k != "labels"}
    for seed, name in enumerate("ab"):
        adapter = peftree.adapt(model, InLayer(sites=where), name=name, head=False, seed=seed)
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    rows = ["a", None, "b"]

    def output(**inputs: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**inputs).logits
        return found

    with peftree.route(model, rows):
        mixed = output(**batch)
    for i, name in enumerate(rows):
        peftree.switch(model, name)
        assert torch.allclose(mixed[i], output(**batch)[i], atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 1e-3


def test_merging_folds_what_the_model_computes_in_use() -> None:
    class Drawn(LowRank):
        def weight(self, W: Tensor) -> Tensor:
            return Reweight.weight(self, W) if self.training else super().weight(W)

    class Random(Half):
        name: ClassVar[str] = "random"

        def build(self, place: Place) -> Any:
            return Drawn(place, *lora_factors(place, 4), 1.0)

    model = zoo.build("llama").eval()
    adapter = peftree.adapt(model, Random())
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_()
        want = model(**zoo.batch("llama")).logits
        peftree.merge(model.train())
        assert torch.allclose(model.eval()(**zoo.batch("llama")).logits, want, atol=1e-4)
    assert all(not m.training for d in adapter.deltas.values() for m in d.modules())


def test_a_size_is_the_files_to_say_and_a_dimension_is_not(half: str, tmp_path: Path) -> None:
    adapter = peftree.adapt(zoo.build("llama"), half)
    folder = peftree.save(adapter, tmp_path / "a", format="native")
    given = unpack(tools.weights_of(folder).read_bytes())
    tools.reseal(folder, pack({name: tensor[None] for name, tensor in given.items()}))
    with pytest.raises(StoreError, match="has the shape"):
        peftree.load(zoo.build("llama"), folder)
