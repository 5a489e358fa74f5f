"""One new file of 16 lines is a whole method: registry, contract, command line, docs, store, with no other edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from typer.testing import CliRunner

import peftree
import zoo
from contract.checks import CHECKS, Case
from contract.test_contract import DEAR
from peftree import describe, registry
from peftree.advise.candidates import candidates
from peftree.bench.suite import load_suite
from peftree.cli import app
from peftree.errors import ConfigError, MethodError
from peftree.plan import plan, request
from peftree.settings import load_config
from sampled import quick
from store import tools

SOURCE = '''"""Scaled output: y = (1 + g) y, one trained number per output unit (an example)."""
from typing import ClassVar
from peftree.deltas import Frozen, Reweight
from peftree.methods.contract import Field, Method, Place, Tags

class Scaled(Method):
    tags: ClassVar[Tags] = Tags("additive", "none", True, True, lr=1e-2, needs_dense_weight=True)
    sites: str = Field("attn.v ffn.down", description="which outputs are scaled")
    strength: float = Field(1.0, gt=0, le=10, description="factor on g")
    def count(self, sites): return sum(s.out_features for s in sites)
    def build(self, place: Place): return Delta(place.zeros(place.site.out_features), self.strength)

class Delta(Reweight):
    def __init__(self, g, s): super().__init__(); self.g, self.s = g, s
    def weight(self, W): return ((1 + self.s * self.g)[:, None] * W).to(W.dtype)
    def bias(self, b): return b if b is None else ((1 + self.s * self.g) * b).to(b.dtype)
'''


# A method that Hugging Face PEFT has too (there MISS), which says so itself: its input's groups of r share one matrix.
PEFTS = '''"""Shared shards: W' = W + D^T tiled along the input, D of r rows (an example)."""
from typing import ClassVar
import torch
from peftree.deltas import Reweight
from peftree.methods.contract import Field, Method, Peft, Place, Tags

class Shards(Method):
    tags: ClassVar[Tags] = Tags("reparameterized", "none", True, True, lr=1e-2, needs_dense_weight=True, small={"r": 4},
        peft=Peft("MISS", {"r": "r"}, {"miss_block": "D"}, {"init_weights": True, "mini_r": 1}))
    sites: str = Field("attn.q attn.v", description="which weights change")
    r: int = Field(16, ge=1, description="rows of D")
    def count(self, sites): return sum(self.r * s.out_features for s in sites)
    def build(self, place: Place): return Delta(place.zeros(self.r, place.site.out_features))

class Delta(Reweight):
    def __init__(self, D): super().__init__(); self.D = D
    def weight(self, W):
        wide = self.D.mT.repeat(1, -(-W.shape[-1] // len(self.D)))
        return (W + wide[:, : W.shape[-1]]).to(W.dtype)
'''


SUITE = """\
suite: mine
version: 1
tier: smoke
title: Mine
protocol: {{trials: 2, seeds: 3, rates: [0.1, 100]}}
methods: {{full: {{cost: 2}}, {method}: {{}}}}
tasks:
  reviews:
    task: text-classification
    model: minilm-l6
    dataset: reviews
    data: {{source: movies, sizes: {{train: 20, valid: 10, test: 10}}}}
    settings: {{steps: 4, max_length: 16}}
    probes: {{calibration: {{}}}}
"""


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


@pytest.fixture
def shards(folder: Path) -> str:
    (folder / "reparameterized").mkdir()
    (folder / "reparameterized" / "shards.py").write_text(PEFTS)
    registry.register_folder(folder)
    return "shards"


def test_pefts_files_follow_from_the_file(shards: str, tmp_path: Path) -> None:
    model = zoo.build("llama").eval()
    adapter = peftree.adapt(model, shards, r=4)
    tools.shake(adapter.parameters())
    written = peftree.save(adapter, tmp_path / "out", format="peft")
    with tools.Quiet():
        theirs = peft.PeftModel.from_pretrained(zoo.build("llama"), written).eval()
        config = peft.MissConfig(r=4, target_modules=["q_proj", "v_proj"])
        other = peft.get_peft_model(zoo.build("llama"), config).eval()
        tools.shake([p for p in other.parameters() if p.requires_grad])
        other.save_pretrained(tmp_path / "theirs")
    want = tools.output("llama", model)
    assert (tools.output("llama", theirs) - want).abs().max() < 1e-5
    assert (tools.output("llama", zoo.build("llama").eval()) - want).abs().max() > 1e-3
    reader = zoo.build("llama").eval()
    peftree.load(reader, tmp_path / "theirs")
    assert (tools.output("llama", reader) - tools.output("llama", other)).abs().max() < 1e-5


def test_settings_planner_benchmark_and_adviser_follow_from_the_file(shards: str, tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "base")
    found = plan(request(model=str(tmp_path / "base"), method=shards, batch_size=2, max_length=8))
    assert found.how == "traced" and found.trainable == 2 * 16 * (32 + 16)
    assert shards in {c.method for c in candidates([])}
    (tmp_path / "mine.yaml").write_text(SUITE.format(method=shards))
    assert load_suite(tmp_path / "mine.yaml").methods.keys() == {"full", shards}
    told = ["task=generation", f"model={tmp_path}", f"data={tmp_path}", f"method={shards}"]
    assert load_config(None, [*told, "method.fields.r=2"]).method.fields == {"r": 2}


def test_the_file_is_short() -> None:
    assert len(SOURCE.splitlines()) <= 16 + 1


def test_it_is_found_and_described(scaled: str) -> None:
    assert scaled in registry.methods()
    info = describe.describe_method(scaled)
    assert info["equation"].startswith("y = (1 + g) y") and info["branch"] == "additive"
    assert {f["name"] for f in info["fields"]} == {"sites", "layers", "strength"}
    shown = CliRunner().invoke(app, ["methods", "--json"])
    assert "scaled" in {row["name"] for row in json.loads(shown.stdout)}
    one = CliRunner().invoke(app, ["methods", "scaled"])
    assert "strength" in one.stdout and one.exit_code == 0
    assert f"default lr 0.01: {describe.OURS}" in one.stdout, "a file that says nothing chose its rate itself"


@pytest.mark.parametrize("model", quick(zoo.CORE))
def test_it_passes_the_contract(scaled: str, model: str) -> None:
    case = Case(registry.make(scaled, {}), model)
    for name in CHECKS.keys() - DEAR:
        CHECKS[name](case)


@pytest.mark.slow
def test_it_passes_the_dearest_checks(scaled: str) -> None:
    case = Case(registry.make(scaled, {}), "decoder")
    for name in DEAR:
        CHECKS[name](case)


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
        (("    def count(self, sites)", "    def cuont(self, sites)"), "defines no count"),
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
