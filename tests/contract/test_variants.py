"""Forms of a method that its defaults do not build: checks that a form alone can break, and an equation each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftree
import zoo
from contract.case import Case, close, shake
from contract.checks import CHECKS
from peftree import registry
from peftree.deltas import read

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("surm", {"form": "toeplitz"}),
    ("fact", {"form": "tucker", "r": 4}),
    ("delora", {"start": "copy", "r": 4}),
    ("shira", {"mask": "magnitude", "r": 2}),
    ("road", {"variant": "road_4", "group": 8}),
    ("miss", {"variant": "mini", "columns": 4, "r": 8}),
    ("lokr", {"r": 3}),
    ("glora", {"matrices": "vector", "coupling": "vector", "biases": "vector"}),
    ("s4", {}),
    ("k_adapter", {"fusion": "add", "size": 8, "heads": 2}),
    ("diff_pruning", {"structured": False, "share": 0.1}),
    ("x_peft", {"mask": "soft", "adapters": 12, "reduction": 4}),
]
ALONE = ("identity", "counted", "alive", "merges", "quick_equals_dense", "round_trip")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), FORMS, ids=[f"{n} {f}" for n, f in FORMS])
def test_a_form(name: str, fields: dict[str, Any]) -> None:
    for check in ALONE:
        CHECKS[check](Case(registry.make(name, fields), "encoder" if name == "glora" else "decoder"))


def change(name: str, **fields: Any) -> tuple[Any, Tensor, Tensor]:
    """A moved delta at a square weight of the encoder, the weight, and how it changes."""
    model = zoo.build("bert_cls").eval()
    adapter = peftree.adapt(model, name, head=False, sites="attn.q", **fields)
    shake(adapter, 0.2)
    _, site, delta = adapter.entries[1]
    delta.requires_grad_(False)
    W = model.get_submodule(site.path).weight.detach()
    return delta, W, delta.weight(W).detach() - W


def test_toeplitz() -> None:
    delta, W, got = change("surm", form="toeplitz")
    apart = (torch.arange(len(W))[:, None] - torch.arange(len(W))).abs()
    T = [t.detach()[apart] for t in (delta.b, delta.a)]
    assert close(got, T[0] @ T[1])


def test_tucker() -> None:
    delta, _, got = change("fact", form="tucker", r=4)
    core = sum(p * C for p, C in zip(delta.S[0, 0], delta.shared["C"].unbind(-1), strict=True))
    assert close(got, delta.shared["V"] @ core @ delta.shared["U"])
    assert got.abs().max() > 1e-3


def test_the_largest_entries() -> None:
    delta, W, got = change("shira", mask="magnitude", r=2)
    kept = W.abs().flatten().topk(2 * sum(W.shape)).indices
    assert set(got.flatten().nonzero().flatten().tolist()) == set(kept.tolist()) == set(delta.at.tolist())


STACKED = [
    "miss",
    "loha",
    "lokr",
    "c3a",
    "road",
    "delora",
    "randlora",
    "boft",
    "shira",
    "vb_lora",
    "hira",
    "fact",
    "diff_pruning",
]


@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts(name: str) -> None:
    """One delta for a stack changes each expert's weight as a delta with that expert's tensors alone would."""
    model = zoo.build("mixtral").eval()
    fields = dict(registry.get(name).tags.small) | {"sites": "ffn.gate"}
    adapter = peftree.adapt(model, name, head=False, **fields)
    shake(adapter, 0.2)
    _, site, delta = adapter.entries[0]
    delta.requires_grad_(False)
    W = read(model.get_submodule(site.path), site).weight.detach()
    assert site.kind == "expert" and W.dim() == 3
    got = delta.weight(W)
    assert not close(got, W)
    for i in range(len(W)):
        one = copy.deepcopy(delta)
        for table in (one._parameters, one._buffers):
            table.update({n: nn.Parameter(t[i], False) if t.is_floating_point() else t[i] for n, t in table.items()})
        assert close(one.weight(W[i]), got[i])
