"""The study's page: made from the pack alone, the same each time, and plain about what is missing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import yaml

from invented import METHODS, TASKS, study
from peftree import registry, report
from peftree.bench.command import pack
from peftree.bench.suite import load_suite
from peftree.report import panels
from peftree.runs.read import read_packed
from peftree.runs.record import RunRecord

ROOT = Path(__file__).parents[1]
TASK = {**TASKS[0], "task": "movies"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The tool that makes the page."""
    return importlib.import_module("tools.study")


def invented(**task: float) -> list[RunRecord]:
    """Return a task of the suite `small`, its fields those of the suite; one seed of ia3 is not there."""
    out = []
    for r in study(tasks=[{**TASK, **task}], seeds=5, trials=4):
        fields = registry.spec(registry.make(r.method, {}))["fields"]
        peak = 4 * (r.trainable_parameters or 0) + 1000
        out.append(r.model_copy(update={"suite": "small", "fields": fields, "allocator_peak_bytes": peak}))
    return [r for r in out if (r.method, r.phase, r.seed) != ("ia3", "final", 4)]


def row(page: str, start: str) -> list[str]:
    """Return the cells of the last line that starts with `start`: that of the task's own table."""
    *_, line = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_the_same_each_time_and_says_what_is_missing(tool: ModuleType, tmp_path: Path) -> None:
    for r in invented():
        r.write(tmp_path)
    pack(tmp_path, tmp_path / "pack.gz")
    records = read_packed(tmp_path / "pack.gz")
    page = tool.files(records, load_suite("small"))["study.md"]
    assert page == tool.files(read_packed(tmp_path / "pack.gz"), load_suite("small"))["study.md"]
    assert "**The study is partial**: 11 of 263 cells" in page and "peftree bench run small" in page
    assert row(page, "`clothing`")[1:3] == ["0 / 25", "0 / 225"]
    assert row(page, "`movies` | 11 / 25")[2:] == ["107 / 225", "`ia3`"]
    assert (
        "`ia3`" not in page.partition("## Runs")[0].partition("## Published")[0]
        and "/tmp" not in page
        and "/work" not in page
    )


def test_verdicts_are_the_reports_and_memory_is_over_fulls(tool: ModuleType) -> None:
    page = tool.files(invented(), load_suite("small"))["study.md"]
    assert row(page, "`prompt_tuning`")[3] == "not retained"
    full, lora = row(page, "`full`"), row(page, "`lora`")
    assert full[2:5] == ["–", "reference", "–"] and full[7:11] == ["100 %"] * 4
    assert lora[5] == "–" and lora[10] == "1.2 %" and lora[3] in ("shown", "not shown")
    assert "no difference shown" in row(page, "`dora`")[5] and "worse" in row(page, "`head_only`")[4]
    assert int(row(page, "all")[1]) == 9 == sum(map(int, row(page, "all")[2:6]))


def test_the_answers_count_what_the_table_counts(tool: ModuleType) -> None:
    page = tool.files(invented(), load_suite("small"))["study.md"]
    answer = page.partition("## In short")[2].partition("Finished methods")[0]
    shown, open_, refuted, none = map(int, row(page, "all")[2:6])
    assert shown and f"For {shown} of 9 pairs" in answer and f"for {refuted} refuted, for {open_} open" in answer
    assert f"for {none} full fine-tuning, as run, had no gain" in answer
    saved = re.search(
        r"gradients and optimizer\*\*: (\S+) % in the median, at most (\S+) % \(`(\w+)` on `movies`\)", answer
    )
    assert saved is not None
    section = page.partition("### movies")[2]
    kept = [each for name, *_ in METHODS if name != "ia3" and (each := row(section, f"`{name}`"))[3] == "shown"]
    least = min(float(each[10].removesuffix(" %")) for each in kept)
    assert (
        float(saved[2]) == pytest.approx(100 - least, abs=0.51) and row(section, f"`{saved[3]}`")[10] == f"{least:g} %"
    )


def test_where_full_loses_against_the_baseline_nothing_is_called_retained(tool: ModuleType) -> None:
    page = tool.files(invented(top=0.5, floor=0.8), load_suite("small"))["study.md"]
    assert row(page, "`lora`")[2:4] == ["–", "no gain to retain"] and "weak reference" in page
    assert row(page, "all")[2:6] == ["0", "0", "0", "9"]


def test_without_a_reference_nothing_is_compared(tool: ModuleType) -> None:
    page = tool.files([r for r in invented() if r.method != "full"], load_suite("small"))["study.md"]
    assert "No task has finished runs of both" in page


def test_methods_and_claims_are_counted_from_the_same_verdicts(tool: ModuleType) -> None:
    page = tool.files(invented(), load_suite("small"))["study.md"]
    counted = page.partition("## Method by method")[2].partition("## Published")[0]
    claims = page.partition("## Published")[2].partition("## How to read")[0]
    for name in ("lora", "dora", "prompt_tuning", "head_only"):
        shown = row(page, f"`{name}`")[4]
        word = "better" if "better" in shown else "worse" if "worse" in shown else "no difference shown"
        place = ("better", "no difference shown", "worse").index(word)
        assert row(counted, f"`{name}`")[4].split(" / ") == ["1" if k == place else "0" for k in range(3)], name
    assert row(counted, "`lora`")[5] == "–" and row(counted, "`full`")[4] == "–"
    assert row(claims, "`full` better than `prompt_tuning`")[2:] == ["1", "`movies`", "0", "–"]
    assert row(claims, "`dora` better than `lora`")[2:] == ["1", "–", "1", "–"]
    assert "`ssf`" not in claims  # was not run
    assert "Over all tasks the claimed direction is shown 1 times" in claims


def test_the_claims_tasks_are_those_with_a_verdict(tool: ModuleType) -> None:
    lines = [line for line in (ROOT / "docs" / "study.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    claims = [cells for line in lines if len(cells := [c.strip() for c in line.strip("|").split("|")]) == 6
              and re.search("` (as good as|better than) `", cells[0])]  # fmt: skip
    assert len(claims) > 10
    for _, _, tasks, better, same, worse in claims:
        assert int(tasks) == better.count("`") / 2 + int(same) + worse.count("`") / 2


def test_claims_name_methods_that_the_suite_has(tool: ModuleType) -> None:
    names = {"lora sites=linear", *(entry.method or name for name, entry in load_suite("small").methods.items())}
    found = yaml.safe_load(tool.CLAIMS.read_text("utf-8"))
    assert found and all({one["one"], one["other"]} <= names and "arXiv" in one["source"] for one in found)
    assert {one["says"] for one in found} == {"better than", "as good as"}


def test_figures_are_files_of_their_own(tool: ModuleType) -> None:
    made = tool.files(invented(), load_suite("small"))
    drawn = {name for name in made if name.endswith(".svg")}
    assert drawn == set(re.findall(r"!\[[^]]*\]\((.*?)\)", made["study.md"])) and len(drawn) >= 2
    for name in drawn:
        root = ElementTree.fromstring(made[name])
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(--additive)" in made[name]
        used = set(re.findall(r'href="#([^"]+)"', made[name]))
        assert used and used <= set(re.findall(r' id="([^"]+)"', made[name]))


@pytest.mark.slow
def test_what_is_committed_is_what_the_pack_gives(tool: ModuleType) -> None:
    records = read_packed(tool.PACK)
    made = tool.files(records, load_suite("small")) | {"study/report.html": report.page.render(report.build(records))}
    for name, content in made.items():
        assert (tool.PAGE.parent / name).read_text("utf-8") == content, f"{name}: run `make study`"
    there = {f"study/{file.name}" for file in tool.PACK.parent.iterdir()}
    assert there == {name for name in made if "/" in name} | {"study/small.jsonl.gz"}


def test_a_sheet_shows_every_panel_in_a_place_of_its_own(tool: ModuleType) -> None:
    found = study(tasks=[TASK])
    group = panels.sensitivity(report.build(found).tasks[0])
    assert group is not None and len(group.panels) > 4
    root = ElementTree.fromstring(tool.svg_file(tool.sheet(group)))
    inner = [each for each in root if each.tag.endswith("svg") and each.get("role") == "img"]
    assert len({(each.get("x"), each.get("y")) for each in inner}) == len(inner) == len(group.panels)
    _, _, width, height = map(float, str(root.get("viewBox")).split())
    assert all(float(str(e.get("x"))) + 200 <= width and float(str(e.get("y"))) + 128 <= height for e in inner)
    known = {each.get("id") for each in root.iter()}
    assert {str(each.get("href"))[1:] for each in root.iter() if each.get("href")} <= known
