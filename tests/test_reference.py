"""Every method against its reference: a dense forward in functions of at most 20 lines, from the paper's equation."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import house
import peftree
import reference_model as bench
import zoo
from contract.checks import shake
from peftree import registry

FOLDER = Path(__file__).parent / "reference"
METHODS = sorted(registry.methods())
LIMIT = 20
CASES = [
    (name, model)
    for name in METHODS
    if (FOLDER / f"{name}.py").is_file()  # asked for below
    for model in vars(importlib.import_module(f"reference.{name}")).get("MODELS", ("llama", "bert_cls"))
    if (name, model) not in (("bitfit", "llama"), ("s_bitfit", "llama"))  # nothing there has a bias
]


@pytest.fixture
def double() -> Iterator[None]:
    """In float64 a wrong term shows, and no CPU's rounding does."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("name", "key"), CASES)
def test_forward_and_gradients(name: str, key: str) -> None:
    reference = importlib.import_module(f"reference.{name}")
    model = zoo.build(key).eval()
    batch = zoo.batch(key)
    with torch.no_grad():
        base = zoo.output(key, model(**batch))
    adapter = peftree.adapt(model, name, head=False, **registry.get(name).tags.small)
    if type(adapter.method).tags.needs_data:
        adapter.init([lambda: model(**batch).loss])
    shake(adapter, 0.2)
    leaves: dict[int, Any] = {}
    parts = bench.parts_of(adapter, leaves)
    own = [p for p in adapter.parameters() if p.requires_grad]
    got = zoo.output(key, model(**batch))
    want = bench.forward(key, reference, parts, adapter.method)
    assert bench.close(got, base) > 1e-4, "the adapter does nothing here"
    assert bench.close(got, want) <= 1e-9
    theirs = bench.gradients(want.square().mean(), [leaves[id(p)] for p in own])
    ours = bench.gradients(got.square().mean(), own)
    size = max(float(t.abs().max()) for t in theirs)
    for mine, right in zip(ours, theirs, strict=True):
        assert float((mine - right).abs().max()) <= 1e-9 * size


@pytest.mark.parametrize("name", METHODS)
def test_references_are_short(name: str) -> None:
    path = FOLDER / f"{name}.py"
    assert path.is_file(), f"write {path.name}: the method's equation as a dense forward"
    functions = [n for n in house.parse(path).body if isinstance(n, ast.FunctionDef)]
    assert all((f.end_lineno or 0) - f.lineno < LIMIT for f in functions)
    assert not [t for t in house.imports(FOLDER)[f"reference.{name}"] if t[0].startswith("peftree")]


def test_every_reference_is_of_a_method() -> None:
    assert {p.stem for p in FOLDER.glob("*.py")} - {"__init__"} == set(METHODS)
