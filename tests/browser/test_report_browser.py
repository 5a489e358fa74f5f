"""The report page in a real headless Chromium: silent, asks for nothing, sorts and filters."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from invented import fabricated, hostile, study
from peftree import report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 30.0  # seconds
expect = sync_api.expect
expect.set_options(timeout=PATIENCE * 1000)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.enable_socket,  # the browser is driven over a local pipe; the page stays offline
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium found: apt-get install chromium"),
]


class Watched:
    """A page with all that it said and asked for."""

    def __init__(self, page: Any, size: int) -> None:
        self.page = page
        self.size = size
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def methods(self) -> list[str]:
        """Return the visible methods of the first table, from top to bottom."""
        cells = self.page.locator("table.results").first.locator("tbody tr:visible th")
        return [cell.split("\n")[0].strip() for cell in cells.all_inner_texts()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests here."""
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page on plausible records, on hostile ones and on a whole study with trials and probes."""
    folder = tmp_path_factory.mktemp("report")
    out = {}
    for name, records in (("plain", fabricated()), ("hostile", hostile()), ("study", study())):
        out[name] = folder / f"{name}.html"
        out[name].write_text(report.page.render(report.build(records)), encoding="utf-8")
    return out


@pytest.fixture
def opened(browser: Any, files: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Watched]:
    """The page in a fresh offline window; parameters are the window's options."""
    options = {"viewport": {"width": 1280, "height": 900}, **getattr(request, "param", {})}
    path = files[options.pop("file", "plain")]
    context = browser.new_context(offline=True, **options)
    watched = Watched(context.new_page(), path.stat().st_size)
    watched.page.goto(path.as_uri())
    yield watched
    assert watched.said == []
    assert watched.asked == [path.as_uri()]
    context.close()


def becomes(watched: Watched, read: Callable[[], Any], wanted: Any) -> None:
    """Wait until `read` returns `wanted`: the page works an event off after the driver has sent it."""
    found, end = read(), time.monotonic() + PATIENCE
    while found != wanted and time.monotonic() < end:
        watched.page.wait_for_timeout(10)
        found = read()
    assert found == wanted


def picture(watched: Watched, name: str) -> None:
    """Save a screenshot for a person to look at where PEFTREE_SCREENSHOTS names a folder."""
    folder = os.environ.get("PEFTREE_SCREENSHOTS")
    if folder:
        watched.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


@pytest.mark.parametrize(
    "opened",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"java_script_enabled": False},
        {"viewport": {"width": 400, "height": 800}},
        {"file": "hostile"},
        {"file": "study"},
        {"file": "study", "color_scheme": "dark"},
        {"file": "study", "viewport": {"width": 400, "height": 800}},
    ],
    indirect=True,
    ids=["light", "dark", "no-script", "phone", "hostile", "study", "study-dark", "study-phone"],
)
def test_the_page_is_silent_whole_and_does_not_scroll_sideways(opened: Watched, request: pytest.FixtureRequest) -> None:
    picture(opened, request.node.callspec.id)
    page = opened.page
    assert opened.size < (1_000_000 if "study" in opened.page.url else 300_000)
    assert page.locator("table.results tbody tr").count() >= 12
    assert page.locator("figure svg").count() >= 5 and page.locator("svg.panel").count() >= 12
    box = page.locator("body").bounding_box()
    assert box is not None and box["width"] <= page.viewport_size["width"]


def test_a_click_sorts_up_then_down_with_gaps_last(opened: Watched) -> None:
    button = opened.page.get_by_role("button", name="Trainable").first
    head = opened.page.locator("table.results").first.locator("th[data-name=trainable]")
    button.click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    becomes(opened, lambda: opened.methods()[:: len(opened.methods()) - 1], ["head_only", "full"])
    button.click()
    expect(head).to_have_attribute("aria-sort", "descending")
    becomes(opened, lambda: opened.methods()[:: len(opened.methods()) - 1], ["full", "head_only"])
    opened.page.get_by_role("button", name="Against full").first.click()
    expect(head).not_to_have_attribute("aria-sort", re.compile(""))
    becomes(opened, lambda: opened.methods()[-1], "full")


def test_the_keyboard_reaches_and_works_sorting_and_filtering(opened: Watched) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    becomes(opened, lambda: page.evaluate("document.activeElement.className"), "skip")
    seen = []
    for _ in range(80):  # a press that the page has not worked off yet is seen by a later turn
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.tagName"))
        if page.evaluate("!!document.activeElement.closest('table.results')"):
            break
    assert {"A", "INPUT", "SELECT", "BUTTON"} <= set(seen)
    names = sorted(opened.methods())
    page.keyboard.press("Enter")
    becomes(opened, opened.methods, names)
    page.keyboard.press("Space")
    becomes(opened, opened.methods, names[::-1])
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_filters_hide_rows_and_say_how_many_are_left(opened: Watched) -> None:
    page = opened.page
    section = page.locator("section.task").first
    box = section.get_by_label("Filter")
    box.fill("lora")
    becomes(opened, lambda: sorted(opened.methods()), ["lora", "molora"])
    expect(section.locator("output")).to_have_text("2 of 12 methods shown")
    section.get_by_label("Branch", exact=True).select_option("moe")
    becomes(opened, opened.methods, ["molora"])
    section.get_by_role("button", name="accuracy").click()
    expect(section.locator("th[aria-sort]")).to_have_count(1)
    becomes(opened, opened.methods, ["molora"])
    box.fill("")
    section.get_by_label("Branch", exact=True).select_option("")
    becomes(opened, lambda: len(opened.methods()), 12)
    expect(section.locator("output")).to_have_text("")


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_script_the_table_is_there_and_no_dead_control_is(opened: Watched) -> None:
    assert len(opened.methods()) == 12
    assert opened.page.locator("thead button").count() == 0
    assert opened.page.locator(".filter:visible").count() == 0


def test_names_are_drawn_inside_the_figures_and_do_not_overlap(opened: Watched) -> None:
    overlaps = opened.page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            const boxes = [...svg.querySelectorAll("text")].map(
                text => [text.textContent, text.getBoundingClientRect()]);
            const out = boxes.filter(
                ([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1
                    || b.top < frame.top - 1 || b.bottom > frame.bottom + 1
            ).map(([name]) => "cut " + name);
            boxes.forEach(([name, a], i) => boxes.slice(0, i).forEach(([other, b]) => {
                const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                if (w > 2 && h > 4) out.push(name + " on " + other);
            }));
            return out;
        })"""
    )
    assert overlaps == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Any, files: dict[str, Path], scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, offline=True)
    page = context.new_page()
    page.goto(files["plain"].as_uri())
    ratios = page.evaluate(
        """() => {
            const light = name => {
                const probe = document.body.appendChild(document.createElement("i"));
                probe.style.color = `var(--${name})`;
                const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3);
                probe.remove();
                const [r, g, b] = parts.map(v => v / 255).map(
                    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ratio = (name, on) => {
                const [a, b] = [light(name), light(on)].sort((x, y) => y - x);
                return [name + " on " + on, (a + 0.05) / (b + 0.05)];
            };
            const inks = ["fg", "soft", "link", "good", "bad", "additive", "selective",
                "reparameterized", "hybrid", "moe", "unified", "reference"];
            return Object.fromEntries([
                ...inks.flatMap(name => [ratio(name, "bg"), ratio(name, "band")]),
                ...["load", "train", "saved", "gradients", "optimizer"].map(name => ratio(name, "bg"))]);
        }"""
    )
    words = {"fg", "soft", "link", "good", "bad"}  # WCAG: 4.5 for text, 3 for symbols and bars
    poor = {name: ratio for name, ratio in ratios.items() if ratio < (4.5 if name.split()[0] in words else 3.0)}
    assert len(ratios) == 29 and poor == {}
    context.close()


def test_it_prints_with_every_record_and_without_controls(opened: Watched, tmp_path: Path) -> None:
    opened.page.emulate_media(media="print")
    expect(opened.page.locator(".filter:visible")).to_have_count(0)
    expect(opened.page.locator("nav")).to_be_hidden()
    printed = opened.page.pdf(path=str(tmp_path / "report.pdf"), prefer_css_page_size=True)
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") <= 20


def shown(watched: Watched, selector: str) -> list[str]:
    """Return the first words of the visible rows or heads that match."""
    found = watched.page.locator(f"{selector}:visible").all_inner_texts()
    return [text.split("\n")[0].split("\t")[0].strip() for text in found]


@pytest.mark.parametrize("opened", [{"file": "study"}], indirect=True)
def test_filters_of_the_whole_page(opened: Watched) -> None:
    page = opened.page
    form, tasks = page.locator("form.everywhere"), page.locator("section.task:visible")
    heads = page.locator("table.overview thead th:visible")

    def rows(selector: str, *wanted: str) -> None:
        becomes(opened, lambda: sorted(shown(opened, f"{selector} tbody tr")), list(wanted))

    expect(heads).to_have_count(10)
    expect(tasks).to_have_count(6)
    form.get_by_label("Modality").select_option("vision")
    expect(heads).to_have_count(6)
    expect(tasks).to_have_count(2)
    expect(form.locator("output")).to_have_text("2 of 6 tasks shown")
    expect(page.locator("nav li[data-modality]:visible")).to_have_count(2)
    form.get_by_label("Branch").select_option("additive")
    rows("table.overview", "houlsby", "ia3", "prompt_tuning")
    expect(page.locator("#methods > details:visible")).to_have_count(3)
    form.get_by_label("Trainable share").select_option("up to 0.1 %")
    rows("table.overview", "ia3", "prompt_tuning")
    page.locator("#task-1-tuning > summary").click()
    rows("#task-1-tuning", "ia3", "prompt_tuning")
    expect(tasks.first.locator("output")).to_have_text("2 of 12 methods shown")
    form.get_by_role("button", name="Show all").press("Enter")
    expect(tasks).to_have_count(6)
    becomes(opened, lambda: len(shown(opened, "table.overview tbody tr")), 12)
    expect(form.locator("output")).to_have_text("")


@pytest.mark.parametrize("opened", [{"file": "study"}], indirect=True)
def test_the_overview_sorts_with_gaps_last(opened: Watched) -> None:
    page = opened.page
    table = page.locator("table.overview")
    becomes(opened, lambda: shown(opened, "table.overview tbody tr")[0], "full")
    table.get_by_role("button", name="Memory").press("Enter")
    expect(table.locator("thead th").nth(3)).to_have_attribute("aria-sort", "ascending")
    becomes(opened, lambda: shown(opened, "table.overview tbody tr")[0], "head_only")
    column = table.get_by_role("button", name="Mean rank")
    column.press("Space")
    expect(table.locator("th[aria-sort]").get_by_role("button", name="Mean rank")).to_have_count(1)
    column.press("Space")
    expect(table.locator("th[aria-sort=descending]")).to_have_count(1)
    becomes(opened, lambda: shown(opened, "table.overview tbody tr")[0], "head_only")
    becomes(opened, lambda: shown(opened, "table.overview tbody tr")[-1], "molora")  # not ranked


@pytest.mark.parametrize("opened", [{"file": "study"}], indirect=True)
def test_negative_numbers_sort_as_numbers(opened: Watched) -> None:
    page = opened.page
    page.locator("#task-1-retention > summary").click()
    table = page.locator("#task-1-retention table")
    expect(table).to_be_visible()
    table.get_by_role("button", name="Change").click()
    expect(table.locator("th[aria-sort]")).to_have_count(1)
    changes = [
        float(text.split("\n")[0].replace("\u2212", "-"))
        for text in table.locator("tbody td:last-child").all_inner_texts()
    ]
    assert changes == sorted(changes) and len(set(changes)) > 5 and max(changes) < 0


@pytest.mark.parametrize("opened", [{"file": "study"}], indirect=True)
def test_links_lead_to_a_methods_results_and_to_its_runs(opened: Watched) -> None:
    page = opened.page
    page.locator("table.overview tbody").get_by_role("link", name="dora").press("Enter")
    expect(page.locator("#method-dora")).to_have_attribute("open", "")
    becomes(opened, lambda: page.evaluate("document.activeElement.parentElement.id"), "method-dora")
    expect(page.locator("#method-dora tbody tr:visible")).to_have_count(6)
    page.locator("#task-1").get_by_role("link", name="36 runs and 96 trials").click()
    expect(page.locator("#records-task-1 tbody tr:visible")).to_have_count(24)


@pytest.mark.parametrize("opened", [{"file": "study"}], indirect=True)
def test_screen_readers_find_captions_headings_and_labels(opened: Watched) -> None:
    faults = opened.page.evaluate(
        """() => [
            ...[...document.querySelectorAll("table")].filter(t => !t.caption || !t.caption.textContent.trim())
                .map(t => "no caption: " + t.className),
            ...[...document.querySelectorAll("th:not([scope])")].map(t => "no scope: " + t.textContent),
            ...[...document.querySelectorAll("input, select")].filter(c => !c.labels.length)
                .map(c => "no label " + c.id),
            ...[...document.querySelectorAll("tbody tr")].filter(r => r.cells[0].tagName !== "TH")
                .map(r => "no row head: " + r.textContent),
            ...[...document.querySelectorAll("svg[role=img]")].filter(s => s.firstElementChild.tagName !== "title")
                .map(s => "no title"),
            ...[...document.querySelectorAll("table.sorts")].filter(t =>
                [...t.rows].some(r => r.cells.length !== t.rows[0].cells.length))
                .map(t => "ragged " + t.caption.textContent),
        ]"""
    )
    assert faults == []
