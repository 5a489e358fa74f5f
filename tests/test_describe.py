"""What is read of the methods without running their files is what running them gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner

import house
from peftree import describe, registry
from peftree.cli import app
from peftree.errors import MethodError
from peftree.methods.tags import Tags, of_recipe

ROOT = Path(__file__).parents[1] / "src"
PLUGIN = '''"""Mine: W' = W + 1, a method with the name of another.

Invented.
"""

from typing import ClassVar

from peftree.methods.contract import Method, Tags


class Mine(Method):
    """A method."""

    tags: ClassVar[Tags] = Tags("additive", "none", True, True, lr=1e-3)

    def count(self, sites: object) -> int:
        return 0

    def build(self, place: object) -> None:
        return None
'''


def test_the_files_state_what_the_loaded_methods_do() -> None:
    loaded = {name: (cls.tags, describe.equation(cls)) for name, cls in registry.methods().items()}
    stated = describe._stated()
    assert list(stated) == list(loaded)
    for name, (tags, formula) in stated.items():
        want = vars(loaded[name][0]) | {"small": {}, "known": {}, "peft": None}
        assert vars(tags) | {"small": {}, "known": {}} == want and formula == loaded[name][1], name


@pytest.mark.parametrize(
    ("paper", "said", "where"),
    [
        ("arXiv 1", {}, "table 9"),  # the same rate of the same paper
        ("arXiv 2", {}, ""),  # the base's place is not in this paper
        ("arXiv 1", {"lr": 1e-2}, ""),  # and does not have this rate
        ("arXiv 2", {"lr": 1e-2, "lr_from": "README"}, "README"),
        ("arXiv 2", {"lr_from": "README"}, "README"),
    ],
)
def test_a_recipe_takes_the_place_of_a_rate_with_the_rate(paper: str, said: dict[str, object], where: str) -> None:
    base = Tags("selective", "arXiv 1", True, True, lr=1e-3, lr_from="table 9")
    made = of_recipe(base, "selective", paper, said)
    assert made.lr_from == where and made.lr == said.get("lr", 1e-3)


def test_the_command_tells_chosen_rates_from_those_with_a_source() -> None:
    shown = CliRunner().invoke(app, ["methods"]).stdout
    marks = {words[0]: words[5] for line in shown.splitlines() if len(words := line.split()) == 8 or len(words) == 7}
    assert marks["houlsby"] == "0.0003" and marks["vera"] == "0.005*" and describe.OURS in shown
    assert "default lr 0.0003: README" in CliRunner().invoke(app, ["methods", "houlsby"]).stdout
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)}
    assert rows["houlsby"]["default lr from"] == "README" and rows["vera"]["default lr from"] == ""


@pytest.mark.parametrize("more", ["", "'--tree', "])
def test_listing_the_methods_needs_no_torch(more: str) -> None:
    words = f"import sys; sys.argv = ['peftree', 'methods', {more}'--json']\nfrom peftree.cli import main\n"
    quiet = "import io; sys.stdout = io.StringIO()\ntry: main()\nexcept SystemExit: sys.stdout = sys.__stdout__"
    loaded = house.loaded_by(words + quiet, ROOT)
    assert "peftree" in loaded and not {"torch", "transformers"} & loaded


def test_one_method_is_had_without_all_others() -> None:
    words = "from peftree import registry\nassert registry.get('lora').name == 'lora'\nimport sys"
    words += "\nassert 'peftree.methods.reparameterized.lora' in sys.modules"
    words += (
        "\nassert 'peftree.methods.additive.ia3' not in sys.modules\nassert registry.get('lora_fa').name == 'lora_fa'"
    )
    words += "\nassert registry.methods()['lora'] is registry.get('lora')"
    assert "torch" in house.loaded_by(words, ROOT)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "additive").mkdir()
    (tmp_path / "additive" / "lora.py").write_text(PLUGIN, "utf-8")
    registry.register_folder(tmp_path)
    yield tmp_path
    registry.forget_folder(tmp_path)
    sys.modules.pop("peftree.methods.additive.lora", None)


def test_two_files_of_one_name_are_refused_however_one_asks(folder: Path) -> None:
    with pytest.raises(MethodError, match="the name 'lora' is taken"):
        registry.get("lora")


POINTS = {
    "absent_module:X": "does not load: ModuleNotFoundError",
    "peftree:Absent": "does not load",
    "json:dumps": "not a",
}


@pytest.mark.parametrize("value", sorted(POINTS))
def test_an_entry_point_that_gives_no_method_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", value, "peftree.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    registry.methods.cache_clear()
    try:
        with pytest.raises(MethodError, match=POINTS[value]) as caught:
            registry.get("lora")
    finally:
        registry.methods.cache_clear()
    assert value in str(caught.value) and caught.value.fix


def test_a_class_without_a_name_is_called_as_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (describe.HOME / "selective" / "bitfit.py").read_text("utf-8")
    (tmp_path / "their_module.py").write_text(source.replace("BitFit", "Theirs"), "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("theirs", "their_module:Theirs", "peftree.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    registry.methods.cache_clear()
    try:
        assert registry.get("theirs").name == "theirs"
    finally:
        registry.methods.cache_clear()
