"""The methods' pages: equations set, places drawn, counts by the closed form, relations; the tree can be searched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tools import docs
from tools import method_pages as pages

from peftree import describe, registry

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
METHODS = sorted(registry.methods())


def test_an_equation_is_set_and_what_follows_is_a_sentence() -> None:
    made = pages.equation("y = W x + (alpha / r) B_i A^T (x) z, [a, b] * sum <c>")
    assert "<i>y = W x + (&alpha; / r) B<sub>i</sub> A<sup>T</sup> &otimes; z</i>" in made
    assert "<p>[a, b] * sum &lt;c&gt;</p>" in made
    assert "&sum;" in pages.equation("y = sum_k [a, b] * c")


@pytest.mark.parametrize("name", METHODS)
def test_a_drawing_marks_where_the_method_sits(name: str) -> None:
    found, made = pages.places(name), pages.drawing(name)
    assert found, "it fits a small decoder, a ViT or an encoder-decoder"
    drawn = [role for role, *_ in pages.BOXES if role in found]
    assert made.count("<title>") == len(drawn)
    assert all(f"<title>{role}: {found[role]}</title>" in made for role in drawn)


def test_counts_are_those_that_are_known() -> None:
    found = {name: {row[0]: row[1] for row in pages.counts(name)} for name in ("lora", "ia3", "vpt")}
    assert found["lora"]["BERT base"] == "294,912"  # 12 layers x q, v x 8 x (768 + 768)
    assert found["lora"]["Llama 3.2 1B"] == "851,968"  # 16 x 8 x (2048 + 2048 + 2048 + 512)
    assert found["ia3"]["BERT base"] == f"{12 * (768 + 768 + 3072):,}"
    assert found["vpt"]["BERT base"] == "-"
    reasons = {model: why for model, _, _, why in pages.counts("vpt")}
    assert "which this model does not have" in reasons["BERT base"]


def test_relations_name_what_is_built_alike() -> None:
    kin, near, blocks = pages.neighbours("lora")
    assert {"pissa", "rslora"} <= set(kin) and "dylora" in near and "LowRank" in blocks
    assert pages.neighbours("pissa")[0].count("lora") == 1


def test_the_page_of_the_tree_has_every_row() -> None:
    page = docs.tree(describe.method_rows())
    assert page.count("<li data-state=") == 157
    assert all(f'href="{name}.html"' in page for row in describe.tree_rows() for name in row["methods"])


@pytest.mark.browser
@pytest.mark.enable_socket  # the browser is driven over a local pipe; the page stays offline
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium found: apt-get install chromium")
def test_the_tree_is_searched_and_filtered(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    rows, file = describe.tree_rows(), tmp_path / "tree.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{docs.tree(describe.method_rows())}", "utf-8")
    with sync_api.sync_playwright() as made:
        browser = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page: Any = browser.new_page()
        page.goto(file.as_uri())
        told = page.locator("#tree-filter output")
        sync_api.expect(told).to_have_text("157 of 157 rows")
        page.get_by_role("searchbox").fill("2106.09685")
        sync_api.expect(told).to_have_text(f"{sum('2106.09685' in row['paper'] for row in rows)} of 157 rows")
        page.get_by_role("searchbox").fill("")
        for state in ("designed", "open", "record", "out"):
            page.get_by_label(state, exact=True).uncheck()
        sync_api.expect(told).to_have_text(f"{sum(row['state'] == 'works' for row in rows)} of 157 rows")
        assert page.locator("li[data-state=open]:visible").count() == 0
        browser.close()
