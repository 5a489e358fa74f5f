"""The README tells the truth: its tables come from the code, its files exist, its commands are real."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from typer.testing import CliRunner

import peftree
from peftree.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_generated_parts_are_current() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    fresh = tool.current(README)
    table = re.compile(r"<!-- methods:start -->\n(.*)<!-- methods:end -->", re.DOTALL)
    assert table.sub("", fresh) == table.sub("", README), "run `python -m tools.readme`"
    old, new = (set(re.findall(r"`(\w+)`", found[1])) for text in (README, fresh) if (found := table.search(text)))
    assert old <= new, "a method in the table is gone: run `python -m tools.readme`"
    precision = tool.DOCS / "precision.md"
    assert tool.current(precision.read_text("utf-8")) == precision.read_text("utf-8"), "run `python -m tools.readme`"
    assert len(old) > 20 and tool.current(README.replace("`lora`", "`lorax`")) == fresh


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def dead(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere in a fresh checkout; code does not count."""
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)", text)]
    return [n for n in links if n and not n.startswith(("http", "mailto:")) and not (page.parent / n).exists()]


def test_links_lead_somewhere() -> None:
    assert len(PAGES) > 20 and dead(ROOT / "README.md", "[the tree](docs/methods/index.md) [it](docs/index.md#x)")
    assert {page.name: found for page in PAGES if (found := dead(page, page.read_text("utf-8")))} == {}


def test_commands_exist() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    for name in re.findall(r"^peftree (\w+)", README, re.MULTILINE):
        assert re.search(rf"\b{name}\b", shown), name


def test_python_names_exist() -> None:
    for name in set(re.findall(r"peftree\.(\w+)\(", README)):
        assert name in peftree.__all__, name
