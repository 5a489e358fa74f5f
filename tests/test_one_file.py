"""One new file of 15 lines is a whole method: registry, contract, command line, docs, store, with no other edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import peftree
import zoo
from contract.checks import CHECKS, Case
from peftree import describe, registry
from peftree.cli import app
from peftree.errors import ConfigError, MethodError

SOURCE = '''"""Scaled output: y = (1 + g) y, one trained number per output unit (an example)."""
from typing import ClassVar
from peftree.deltas import Frozen, Reweight
from peftree.methods.contract import Field, Method, Place, Tags

class Scaled(Method):
    tags: ClassVar[Tags] = Tags("additive", "none", identity_at_init=True, mergeable=True, lr=1e-2)
    sites: str = Field("attn.v ffn.down", description="which outputs are scaled")
    strength: float = Field(1.0, gt=0, le=10, description="factor on g")
    def build(self, place: Place): return Delta(place.zeros(place.site.out_features), self.strength)

class Delta(Reweight):
    def __init__(self, g, s): super().__init__(); self.g, self.s = g, s
    def weight(self, W): return ((1 + self.s * self.g)[:, None] * W).to(W.dtype)
    def bias(self, b): return b if b is None else ((1 + self.s * self.g) * b).to(b.dtype)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "additive").mkdir()
    yield tmp_path
    if tmp_path.resolve() in registry._FOLDERS:
        registry.forget_folder(tmp_path)


@pytest.fixture
def scaled(folder: Path) -> str:
    (folder / "additive" / "scaled.py").write_text(SOURCE)
    registry.register_folder(folder)
    return "scaled"


def test_the_file_is_short() -> None:
    assert len(SOURCE.splitlines()) <= 15 + 1


def test_it_is_found_and_described(scaled: str) -> None:
    assert scaled in registry.methods()
    info = describe.describe_method(scaled)
    assert info["equation"].startswith("y = (1 + g) y") and info["branch"] == "additive"
    assert {f["name"] for f in info["fields"]} == {"sites", "layers", "strength"}
    shown = CliRunner().invoke(app, ["methods", "--json"])
    assert "scaled" in {row["name"] for row in json.loads(shown.stdout)}
    one = CliRunner().invoke(app, ["methods", "scaled"])
    assert "strength" in one.stdout and one.exit_code == 0


@pytest.mark.parametrize("model", zoo.CORE)
def test_it_passes_the_contract(scaled: str, model: str) -> None:
    case = Case(registry.make(scaled, {}), model)
    for check in CHECKS.values():
        check(case)


def test_it_is_saved_and_loaded(scaled: str, tmp_path: Path) -> None:
    model, batch = zoo.build("llama").eval(), zoo.batch("llama")
    adapter = peftree.adapt(model, scaled, strength=2.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
        want = model(**batch).logits
    peftree.save(adapter, tmp_path / "out")
    other = zoo.build("llama").eval()
    back = peftree.load(other, tmp_path / "out")
    assert back.method == adapter.method
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, want)


def test_its_fields_are_checked(scaled: str) -> None:
    with pytest.raises(ConfigError, match=r"strength=11.*less than or equal to 10"):
        registry.make(scaled, {"strength": 11})
    with pytest.raises(ConfigError, match="Did you mean 'strength'"):
        registry.make(scaled, {"strenght": 1})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("class Scaled(Method):", "class Scaled(Method)"), "does not load"),
        (('Tags("additive"', 'Tags("moe"'), "its branch is 'moe' but it lies in folder 'additive'"),
        (("    def build(self, place: Place)", "    def biuld(self, place: Place)"), "defines no build"),
        (('"""Scaled output: y = (1 + g) y', '"""Scaled output'), "does not state the equation"),
        ((', description="factor on g"', ""), "field 'strength' has no description"),
        (("class Scaled(Method)", "class Scaled(object)"), "defines 0 methods"),
        (("    tags: ClassVar[Tags] =", "    facts: ClassVar[Tags] ="), "declares no `tags"),
    ],
)
def test_a_broken_one_is_refused_by_name(folder: Path, change: tuple[str, str], reason: str) -> None:
    assert change[0] in SOURCE
    text = SOURCE.replace(*change).replace("(an example)", "")
    text = text if "does not state" not in reason else text.replace(", one trained number per output unit ", "")
    (folder / "additive" / "scaled.py").write_text(text)
    registry.register_folder(folder)
    with pytest.raises(MethodError, match=reason) as caught:
        registry.methods()
    assert "scaled.py" in str(caught.value)


def test_a_taken_name_is_refused(folder: Path) -> None:
    (folder / "additive" / "lora.py").write_text(SOURCE)
    registry.register_folder(folder)
    with pytest.raises(MethodError, match="the name 'lora' is taken"):
        registry.methods()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("about: y = x\npaper: none\nbase: lora\nset: {rank: 3}\n", "rank"),
        ("about: y = x\npaper: none\nbase: lroa\n", "lroa"),
        ("about: y = x\npaper: none\nbase: lora\nset: {r: 0}\n", "r"),
        ("about: y = x\nbase: lora\n", "paper"),
        ("about: [", "recipe"),
    ],
)
def test_a_broken_recipe_is_refused_by_name(folder: Path, text: str, reason: str) -> None:
    (folder / "additive" / "mine.yaml").write_text(text)
    registry.register_folder(folder)
    with pytest.raises(MethodError, match=reason) as caught:
        registry.methods()
    assert "mine.yaml" in str(caught.value)


def test_a_folder_without_branches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="no branch folder"):
        registry.register_folder(tmp_path)
