"""The method that docs/concepts.md teaches works as it stands there."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import peftree
import zoo
from contract.case import Case
from contract.checks import CHECKS
from graft.helpers import far, put
from peftree import registry
from sampled import quick

PAGE = (Path(__file__).parents[1] / "docs" / "concepts.md").read_text("utf-8")


@pytest.fixture
def tiled(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "reparameterized").mkdir()
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "reparameterized" / "tiled.py").write_text(source)
    registry.register_folder(tmp_path)
    yield "tiled"
    registry.forget_folder(tmp_path)


LONG = {"compiles", "compiled_passes", "heaps", "effects", "elsewhere", "forgets"}


@pytest.mark.parametrize("checks", quick([set(CHECKS) - LONG, {"effects", "elsewhere", "forgets"}]), ids=len)
def test_the_file_on_the_page_keeps_the_contract(tiled: str, checks: set[str]) -> None:
    for model in ("decoder", "vit"):
        case = Case(registry.make(tiled, dict(registry.get(tiled).tags.small)), model)
        for check in sorted(checks):
            CHECKS[check](case)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_weight_read_outside_a_run_is_as_the_page_says(method: str) -> None:
    """The head's own logits, in a run of the model, say what is right; the base's head what is frozen."""
    said = re.search(r"frozen weight, without a warning:\s`(.*?)`.*?Call the module instead, `(.*?)`", PAGE, re.DOTALL)
    assert said is not None and "`peftree.merge(model)` first and `peftree.unmerge(model)` after" in PAGE
    raw, call = said.groups()
    model = zoo.build("llama")
    ids = zoo.batch("llama")["input_ids"]
    put(model, method, sites="head", std=0.5)
    scope = {"F": functional, "model": model}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        want = model(input_ids=ids).logits
        h = scope["h"] = model.get_decoder()(input_ids=ids).last_hidden_state
        bare = zoo.build("llama").lm_head(h)
        assert far(want, bare) > 1e-2
        assert torch.equal(eval(raw, scope), bare)
        assert far(eval(call, scope), want) < 1e-6
        peftree.merge(model)
        assert far(eval(raw, scope), want) < 1e-5
        peftree.unmerge(model)
        assert torch.equal(eval(raw, scope), bare)


def test_every_hook_is_on_the_page() -> None:
    from peftree.methods import bysite

    assert set(re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)) == set(bysite.HOOKS)
