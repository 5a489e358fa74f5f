"""The survey's tree: 157 rows, each with a state that the registry bears out."""

from __future__ import annotations

import importlib
import json
from collections import Counter

from typer.testing import CliRunner

from peftree import describe, registry
from peftree.cli import app

ROWS = describe.tree_rows()
BRANCHES = {"additive": 63, "selective": 22, "reparameterized": 54, "hybrid": 9, "moe": 6, "unified": 3}
REFERENCES = {"full", "head_only"}  # what methods are measured against


def test_the_rows_are_those_of_the_survey() -> None:
    assert [row["row"] for row in ROWS] == list(range(1, 158))
    assert Counter(row["branch"] for row in ROWS) == BRANCHES
    assert len({row["name"] for row in ROWS}) == 157
    states = Counter(row["state"] for row in ROWS)
    assert set(states) <= {"works", "designed", "open", "record", "out"}
    assert (states["record"], states["out"]) == (4, 6)


def test_a_row_works_if_a_method_of_its_is_there_and_no_method_is_in_two() -> None:
    listed = Counter(name for row in ROWS for name in row["methods"])
    works = {row["row"] for row in ROWS if row["state"] == "works"}
    assert works == {row["row"] for row in ROWS if row["methods"] or row["functions"]}
    assert set(listed) <= set(registry.methods()) - REFERENCES and len(listed) > 25
    assert set(listed.values()) == {1}
    branch = {name: row["branch"] for row in ROWS for name in row["methods"]}
    wrong = {n: b for n, b in branch.items() if b != registry.get(n).tags.branch}
    assert not wrong, "the tree and the method's folder differ"


def test_a_row_without_a_method_may_work_by_a_function_that_names_its_paper() -> None:
    found = {row["name"]: row for row in ROWS if row["functions"]}
    assert set(found) == {"AdapterSoup", "LoraHub"}
    for row in found.values():
        for name in row["functions"]:
            module, _, function = name.rpartition(".")
            doc = getattr(importlib.import_module(f"peftree.{module}"), function).__doc__
            assert row["paper"].removeprefix("arXiv ") in doc and row["methods"] == row["needs"] == []
    shown = CliRunner().invoke(app, ["methods", "--tree"]).stdout
    assert "factors.search()" in shown and "factors.similar()" in shown


def test_a_paper_is_named_alike() -> None:
    differ = {
        name: (registry.get(name).tags.paper, row["paper"])
        for row in ROWS
        for name in row["methods"]
        if registry.get(name).tags.paper.removeprefix("arXiv ") not in row["paper"]
    }
    assert not differ


def test_the_command_shows_all_of_it() -> None:
    shown = CliRunner().invoke(app, ["methods", "--tree"])
    assert shown.exit_code == 0 and "157" in shown.stdout and "AdapterFusion" in shown.stdout
    words = " ".join(shown.stdout.split())
    for mark in {r["state"] for r in ROWS} | {need for r in ROWS for need in r["needs"]}:
        meaning = (describe.STATES | describe.NEEDS)[mark]
        assert f" {mark}: {meaning}" in words, "the legend tells every mark that a row has"
    assert {need for r in ROWS for need in r["needs"]} >= set(describe.NEEDS), "and no other"
    told = json.loads(CliRunner().invoke(app, ["methods", "--tree", "--json"]).stdout)
    assert told == ROWS
    assert [row for row in told if row["state"] == "open" and not row["needs"]] == []
