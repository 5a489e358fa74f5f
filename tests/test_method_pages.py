"""The methods' pages: equations set, places drawn, counts by the closed form, relations; the tree can be searched."""

from __future__ import annotations

import re
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


# A file, a place in a text, or a search that the file or the text describes: where a reader finds the rate.
PLACE = re.compile(
    r"\b(README|section|table|appendix|figure|suite|guide)\b|[\w/*+-]\.(py|sh|bash|ipynb|json|ya?ml|gin)\b"
)


@pytest.mark.parametrize("name", METHODS)
def test_a_rate_with_a_source_names_the_place(name: str) -> None:
    text = registry.get(name).tags.lr_from
    assert len(text) <= 60 and "://" not in text and text == text.strip(" .;,")
    assert not text or PLACE.search(text)


@pytest.mark.parametrize(
    ("name", "where"), [("houlsby", "README"), ("direft", "examples/loreft/README.md"), ("vera", "")]
)
def test_a_page_says_where_the_default_rate_is_from(name: str, where: str) -> None:
    assert registry.get(name).tags.lr_from == where
    assert f"| lr from | {where or 'chosen here'} |" in docs.method(name)


def test_the_page_of_the_tree_says_where_each_rate_is_from() -> None:
    lines = docs.tree(describe.method_rows()).splitlines()
    found = {m[1]: m[2] for line in lines if (m := re.match(r"\| \[(\w+)\]\(.* \|(?: \S+ \|){5} (.*) \|$", line))}
    assert found == {name: registry.get(name).tags.lr_from for name in METHODS}


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
