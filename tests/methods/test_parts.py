"""A recipe's parts keep their hooks and optimizer groups, alone, in company and behind a gate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peftree
import zoo
from peftree import registry
from peftree.methods.contract import Method, Union


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of recipes that peftree looks into."""
    (tmp_path / "recipes" / "hybrid").mkdir(parents=True)
    registry.register_folder(tmp_path / "recipes")
    yield tmp_path / "recipes" / "hybrid"
    registry.forget_folder(tmp_path / "recipes")


def rates(method: Any, key: str = "llama", **fields: Any) -> list[tuple[int, float]]:
    adapter = peftree.adapt(zoo.build(key), method, **fields)
    return [(len(g["params"]), round(g["lr"], 12)) for g in adapter.param_groups(1e-4)]


def loss(method: Method | str) -> float:
    """The extra term of AdaLoRA in some company, on equal tensors."""
    adapter = peftree.adapt(zoo.build("llama"), method)
    term = adapter.aux_loss()
    assert term is not None
    return float(term.detach())


def test_a_union_of_one_is_that_one() -> None:
    plus, ada = peftree.get("lora_plus")(sites="attn.q"), peftree.get("adalora")()
    assert rates(Union(members=[plus])) == rates(plus) == [(2, 1e-4), (2, 16e-4)]
    assert loss(Union(members=[ada])) == pytest.approx(loss(ada), rel=1e-6)
    assert loss(ada + peftree.get("ia3")()) == pytest.approx(loss(ada), rel=1e-6)
    twins = peftree.get("lora_plus")(sites="attn.v") + plus
    assert rates(twins) == [(2, 1e-4), (2, 16e-4)] * 2


def test_a_task_head_is_trained_beside_one_part() -> None:
    plus = peftree.get("lora_plus")(sites="attn.q")
    alone, union = rates(plus, "bert_cls"), rates(Union(members=[plus]), "bert_cls")
    assert sum(n for n, _ in union) == sum(n for n, _ in alone)
    assert (2, 16e-4) in union


@pytest.mark.parametrize("gated", ["", "gated: true\n"])
def test_a_recipe_of_one_part_runs_its_hooks(folder: Path, gated: str) -> None:
    part = "- adalora: {r: 4, target_r: 1, warmup: 0, interval: 1}"
    (folder / "mine.yaml").write_text(f"about: y = W x\npaper: arXiv 1\n{gated}parts:\n  {part}\n")
    registry.methods.cache_clear()
    adapter = peftree.adapt(zoo.build("llama"), "mine")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert adapter.aux_loss() is not None
    adapter.model(**zoo.batch("llama")).loss.backward()  # type: ignore[union-attr,operator]
    adapter.step(100, 100)
    kept = [int((t != 0).sum()) for k, t in adapter.state().items() if k.endswith("/E")]
    assert sum(kept) == len(kept), "the budget is one triplet a site"
    groups = [p for g in adapter.param_groups(1e-4) for p in g["params"]]
    assert len(groups) == len({id(p) for p in groups}) == len(adapter.parameters())


def test_a_gated_prefix_is_folded_after_training(tmp_path: Path) -> None:
    model = zoo.build("llama")
    adapter = peftree.adapt(model, "unipelt", prefix_tuning={"length": 3, "hidden": 8})
    want = model(**zoo.batch("llama")).logits
    adapter.finish()
    assert not [k for k in adapter.state() if k.endswith(("/E", "/W1", "/W2"))]
    assert torch.allclose(model(**zoo.batch("llama")).logits, want, atol=1e-6)
    peftree.save(adapter, tmp_path / "it")
    other = zoo.build("llama")
    peftree.load(other, tmp_path / "it")
    assert torch.allclose(other(**zoo.batch("llama")).logits, want, atol=1e-6)
