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
    assert tool.current(README) == README, "run `python tools/readme.py`"
    assert tool.current(README.replace("`lora`", "`lorax`")) == README


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 5
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_commands_exist() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    for name in re.findall(r"^peftree (\w+)", README, re.MULTILINE):
        assert re.search(rf"\b{name}\b", shown), name


def test_python_names_exist() -> None:
    for name in set(re.findall(r"peftree\.(\w+)\(", README)):
        assert name in peftree.__all__, name
