"""All that a delta knows moves, is copied, saved and loaded with it, for every method."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

import peftree
import zoo
from graft.helpers import far, run
from peftree import registry

NAMES = [n for n, cls in registry.methods().items() if cls.tags.branch != "reference"]

MODELS = {"vpt": "vit", "convpass": "vit", "bitfit": "bert_cls", "s_bitfit": "bert_cls", "xattn_tuning": "t5"}
MODELS |= {"conv_adapter": "convnext"}


@pytest.mark.parametrize("method", NAMES)
def test_a_moved_adapter_is_the_same(method: str, tmp_path: Path) -> None:
    """`cpu` to `cpu:0` makes every tensor another one, as a move to an accelerator does."""
    name = MODELS.get(method, "llama")
    model = zoo.build(name)
    adapter = peftree.adapt(model, method, head=False, **registry.get(method).tags.small)
    model.to("cpu:0")
    adapter.init([lambda: model(**zoo.batch(name)).loss])
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    model.train()
    model(**zoo.batch(name)).loss.backward()
    adapter.step(1, 10)
    model.eval().zero_grad()
    want = run(name, model)
    model.to(torch.float64).to(torch.float32).to("cpu")
    assert far(run(name, model), want) < 1e-5
    assert far(run(name, copy.deepcopy(model)), want) < 1e-5
    assert far(run(name, pickle.loads(pickle.dumps(model))), want) < 1e-5
    peftree.save(adapter, tmp_path / "it")
    other = zoo.build(name).to("cpu:0")
    peftree.load(other, tmp_path / "it")
    other.to("cpu")
    assert far(run(name, other), want) < 1e-5
    peftree.switch(model, None)
    assert far(run(name, model), want) > 1e-4


def test_chosen_entries_follow_what_is_written(tmp_path: Path) -> None:
    """Entries that were chosen, moved and chosen again are the ones that train."""
    model = zoo.build("llama")
    name = "llama"
    adapter = peftree.adapt(model, "fishmask")
    batches = [lambda: model(**zoo.batch(name)).loss]
    base = run(name, model)
    for device in ("cpu:0", "cpu", "cpu:0"):
        model.to(device)
        adapter.init(batches)
        with torch.no_grad():
            adapter.parameters()[0].fill_(0.3)
        assert far(run(name, model), base) > 1e-2
        model.train()(**zoo.batch(name)).loss.backward()
        model.eval()
