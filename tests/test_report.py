"""The report on fabricated records: figures right, failures shown, hostile text harmless."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from invented import METHODS, fabricated, hostile
from peftree import report, text
from peftree.bench.intervals import Interval
from peftree.errors import DataError
from peftree.report import plots, svg, terminal
from peftree.report.build import _headline
from peftree.runs.record import CurvePoint, RunRecord


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    """Two seeds of everything."""
    return fabricated()


@pytest.fixture(scope="module")
def built(records: list[RunRecord]) -> report.Report:
    """The report on them."""
    return report.build(records)


def test_rows_hold_the_figures_of_the_records(built: report.Report, records: list[RunRecord]) -> None:
    task = built.tasks[-1]
    runs = [r for r in records if r.task == task.name and r.method == "lora"]
    row = task.row("lora")
    assert row is not None and row.score is not None and row.costs.train_seconds is not None
    assert row.score.value == pytest.approx(np.mean([r.score for r in runs]))
    assert row.costs.train_seconds == pytest.approx(np.mean([r.train_seconds for r in runs]))
    assert row.trainable == runs[0].trainable_parameters
    assert row.covers == "seeds and items" and (row.seeds, row.items) == (2, 120)
    assert {run.key for run in row.runs} == {r.key for r in runs}
    full = task.row("full")
    assert full is not None and full.relative is not None and full.costs.peak_rss_bytes
    assert full.relative.value == pytest.approx(1.0) and full.verdict == "reference"
    assert row.peak_share == pytest.approx((row.costs.peak_rss_bytes or 0) / full.costs.peak_rss_bytes)


def test_a_report_of_few_tasks_opens_with_what_each_method_keeps(
    built: report.Report, records: list[RunRecord]
) -> None:
    lines = [line for line in built.headlines if "of full fine-tuning's gain over the head alone are kept: " in line]
    assert [line.partition(":")[0] for line in lines] == [task.name for task in built.tasks]
    for line, task in zip(lines, built.tasks, strict=True):
        judged = {row.label: row for row in task.rows if row.retained and row.relative}
        parts = [part.rsplit(" %", 1)[0] for part in line.partition("are kept: ")[2].split("; ")]
        assert {part.split()[0] for part in parts} == set(judged) and "full" not in judged
        kept = [judged[part.split()[0]].relative for part in parts]
        assert [k.value for k in kept if k] == sorted((k.value for k in kept if k), reverse=True)
        row = judged["lora"]
        assert row.relative is not None
        assert row.peak_share and f" at {text.percent(row.peak_share)} of the memory (" in line
        told = f"lora {text.score(100 * row.relative.value, 0)} % [{text.score(100 * row.relative.low, 0)}, "
        verdict = {"yes": "(at least 90 % is shown)", "no": "(refuted)", "not shown": "(open)"}[row.retained]
        assert told in line and verdict in line[line.index(told) :].split(";")[0]
    assert built.headlines[0] in report.page.render(built).replace("&#39;", "'")
    few = [r for r in records if r.method in ("full", "head_only", "lora")]
    whole = [
        r.model_copy(update={"base_score": 0.5}) for r in few if r.method != "head_only" and r.metric == "accuracy"
    ]
    assert (
        "of full fine-tuning's gain over the score before training are kept: lora" in report.build(whole).headlines[0]
    )
    lost = [r.model_copy(update={"score": 0.0, "items": ()}) if r.method == "full" else r for r in few]
    told = [line for line in report.build(lost).headlines if line.endswith("gain is not shown, so no share of it is.")]
    assert len(told) == 3
    unsure = replace(row, relative=Interval(0.5, -np.inf, np.inf), retained="not shown")
    assert "lora 50 % no interval at " in _headline(replace(built.tasks[0], rows=(unsure,)))
    assert report.build([r for r in few if r.method != "lora"]).headlines == ()
    four = [r.model_copy(update={"task": f"{r.task} {n}"}) for r in few for n in range(2) if r.metric == "accuracy"]
    assert len(report.build(four).headlines) == len(report.build(four).tasks) == 4
    many = [r.model_copy(update={"task": f"{r.task} {n}"}) for r in records for n in range(2)]
    assert len(report.build(many).tasks) > 4 and not report.build(many).headlines


def test_verdicts_and_their_count_agree(built: report.Report) -> None:
    for task in built.tasks:
        methods = [r for r in task.rows if r.branch != "reference" and r.difference]
        ties = [r for r in methods if r.verdict == "no difference shown"]
        start = f"{len(ties)} of {len(methods)} methods"
        assert task.statement.startswith(start)
        for row in methods:
            assert row.difference is not None
            assert (row.verdict == "no difference shown") == row.difference.holds(0.0)
        head = task.row("head_only")
        assert head is not None and head.better is False and head.relative is not None
        assert head.relative.value == 0.0


def test_lower_is_better_turns_the_order_and_the_judgement(built: report.Report) -> None:
    task = next(task for task in built.tasks if task.metric == "perplexity")
    values = [row.score.value for row in task.scored if row.score]
    assert values == sorted(values)
    head = task.row("head_only")
    assert head is not None and head.verdict == "higher" and head.better is False


def test_failures_are_rows_and_a_method_that_always_failed_stays_in_the_table() -> None:
    found = [
        r.model_copy(update={"status": "failed", "error": "out of memory", "score": None}) if r.method == "mam" else r
        for r in fabricated(failures=False)
    ]
    built = report.build(found)
    assert len(built.failures) == 6 and "6 failed" in built.summary
    row = built.tasks[0].rows[-1]
    assert (row.label, row.verdict, row.failed) == ("mam", "failed", 2)
    page = report.page.render(built)
    assert "out of memory" in page and "2 of 2 runs failed" in page


def test_no_records_are_an_error() -> None:
    with pytest.raises(DataError, match="no run records"):
        report.build([])


def test_without_full_or_items_the_report_says_so() -> None:
    bare = [r.model_copy(update={"items": ()}) for r in fabricated(1, failures=False)]
    built = report.build(bare)
    row = built.tasks[0].row("lora")
    assert row is not None and row.score is not None and not row.score.known
    assert row.verdict == "not enough data" and row.covers == "nothing (one seed, no items)"
    assert "All methods: no per-item results" in " ".join(built.tasks[0].notes)
    alone = report.build([r for r in fabricated(1) if r.method != "full"])
    assert "No finished run of full" in alone.tasks[0].notes[0]
    assert all(row.difference is None for row in alone.tasks[0].rows)
    for each in (built, alone):
        assert report.page.render(each) and report.to_json(each) and report.to_markdown(each)


def test_a_single_methods_score_stands_beside_that_of_the_base(records: list[RunRecord]) -> None:
    some = [r for r in records if r.metric == "accuracy" and r.method == "lora" and r.status == "ok"]
    one = [r.model_copy(update={"base_score": 0.25}) for r in some if r.task == some[0].task]
    built = report.build(one)
    assert len(built.tasks[0].rows) == 1
    for shown in (report.page.render(built), report.to_markdown(built)):
        assert ", base 0.250" in shown
    two = report.build([*one, *(r.model_copy(update={"method": "ia3"}) for r in one)])
    assert len(two.tasks[0].rows) == 2 and ", base" not in report.to_markdown(two)
    assert ", base" not in report.to_markdown(report.build([r.model_copy(update={"base_score": None}) for r in one]))


@pytest.mark.parametrize(
    "change",
    [
        {"train_seconds": 0.0, "trainable_parameters": 0, "peak_rss_bytes": None},
        {"trainable_parameters": None, "total_parameters": None, "adapter_bytes": None},
        {"rss_after_load_bytes": None, "saved_for_backward_bytes": None, "step_seconds": None},
        {"score": 0.5, "items": (0.5,) * 40, "base_score": 0.5},
        {"score": 1.0, "items": (1.0,) * 40},
        {"score": -1e12, "items": ()},
        {"curve": (CurvePoint(step=0, loss=1.0), CurvePoint(step=0, loss=1.0))},
        {"curve": (CurvePoint(step=1), CurvePoint(step=2, loss=1e30))},
        {"status": "failed", "error": "killed", "score": None},
        {"environment": {}, "fields": {"nested": {"a": [1, None]}}, "learning_rate": None},
    ],
)
@pytest.mark.parametrize("some", ["all", "head_only", "full"])
def test_odd_but_valid_records_still_give_every_output(change: dict[str, Any], some: str) -> None:
    found = [
        r.model_copy(update=change) if some in ("all", r.method) else r
        for r in fabricated(failures=False)
        if r.method in ("full", "head_only", "lora") and r.metric == "accuracy"
    ]
    built = report.build(found)
    page = report.page.render(built)
    assert "nan" not in re.sub(r"<script.*?</script>", "", page, flags=re.S).lower().split()
    assert not re.search(r'="[^"]*\b(?:nan|inf)\b', page)
    assert report.to_markdown(built) and json.loads(report.to_json(built))
    Console(file=io.StringIO(), width=100).print(terminal.render(built))


def test_items_that_do_not_average_to_the_score_are_not_used() -> None:
    found = [r.model_copy(update={"score": 0.5}) for r in fabricated(failures=False)]
    built = report.build(found)
    assert "items do not average to the score" in " ".join(built.tasks[0].notes)
    assert built.tasks[0].rows[0].covers == "seeds only"


def test_mixed_environments_and_repeated_runs_are_not_passed_over() -> None:
    found = fabricated(failures=False)
    other = found[0].model_copy(update={"environment": {"machine": "another"}})
    built = report.build([other, *found[1:]])
    task = next(task for task in built.tasks if task.name == other.task)
    assert "2 environments" in " ".join(task.notes)
    with pytest.raises(DataError, match="occurs twice"):
        report.build([*found, found[0]])
    gone = {"status": "inapplicable", "error": "MethodError: no site", "score": None, "items": (), "environment": {}}
    never_ran = report.build([found[0].model_copy(update=gone), *found[1:]])
    assert len(never_ran.environments) == 1 and "environments" not in never_ran.summary


def test_variants_of_a_method_are_told_apart() -> None:
    found = fabricated(failures=False)
    more = [r.model_copy(update={"fields": {"r": 32}}) for r in found if r.method == "lora"]
    labels = {row.label for row in report.build([*found, *more]).tasks[0].rows}
    assert {"lora", "lora r=32", "dora"} <= labels  # as its author made it: by its name alone
    custom = [r.model_copy(update={"fields": {"r": 16}}) if r.method == "lora" else r for r in found]
    labels = {row.label for row in report.build([*custom, *more]).tasks[0].rows}
    assert {"lora r=16", "lora r=32"} <= labels
    strange = [
        r.model_copy(update={"method": "not-here", "fields": {"r": r.fields["r"]}})
        for r in [*found, *more]
        if r.method == "lora"
    ]
    assert {row.label for row in report.build(strange).tasks[0].rows} == {"not-here r=8", "not-here r=32"}


def test_the_report_does_not_depend_on_the_order_of_records(records: list[RunRecord]) -> None:
    page = report.page.render(report.build(records))
    assert page == report.page.render(report.build(list(reversed(records))))


def test_hostile_text_is_harmless_everywhere() -> None:
    built = report.build(hostile())
    page = report.page.render(built)
    assert "<script>alert" not in page and page.count("<script") == 1
    assert "\x1b" not in page and "\u202e" not in page and "&lt;script&gt;alert" in page
    stream = io.StringIO()
    Console(file=stream, width=200, color_system=None).print(terminal.render(built))
    assert "\x1b" not in stream.getvalue() and "<script>alert" in stream.getvalue()
    markdown = report.to_markdown(built)
    assert "<script" not in markdown and "\x1b" not in markdown
    heads = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line[:1] == "|"}
    assert heads == {11}
    latex = report.to_latex(built)
    assert "\x1b" not in latex and not re.search(
        r"(?<!\\)[$%&#_](?!\s)", latex.replace("$-$", "").replace("% Needs", "")
    )


def test_the_page_is_small_whole_and_asks_for_nothing(built: report.Report) -> None:
    page = report.page.render(built)
    assert len(page.encode()) < 300_000
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page)
    assert "url(" not in page and "@import" not in page and "http://" not in page
    assert page.count("<svg") == page.count("</svg>")
    for drawing in re.findall(r'<svg[^>]*role="img".*?</svg>', page, re.S):
        assert "<title>" in drawing and "<desc>" in drawing
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_write_makes_one_page_from_a_folder(tmp_path: Path, records: list[RunRecord]) -> None:
    for record in records:
        record.write(tmp_path / "runs")
    out = report.write(tmp_path / "runs", tmp_path / "out" / "report.html")
    assert out.read_text().startswith("<!doctype html>")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("width", [80, 120, 240])
def test_the_terminal_table_fits_and_is_complete(built: report.Report, width: int) -> None:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(terminal.render(built))
    shown = stream.getvalue()
    assert max(len(line) for line in shown.splitlines()) <= width
    words = "".join(shown.split())
    assert all(method[0] in words for method in METHODS) and "TrainError" in words


def test_json_is_plain_and_holds_the_intervals(built: report.Report) -> None:
    data = json.loads(report.to_json(built))
    row = data["tasks"][0]["rows"][0]
    assert set(row["score"]) == {"value", "low", "high"} and "curves" not in row


def test_pareto_front_by_hand() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8), (4.0, 0.9), (5.0, 1.0)]
    assert plots.pareto(points, higher_is_better=True) == [0, 2, 5]
    assert plots.pareto(points, higher_is_better=False) == [0, 1]


def test_labels_of_a_crowd_do_not_overlap() -> None:
    points = [(200.0 + 3 * i, 150.0 + 2 * (i % 4)) for i in range(12)]
    labels = [f"method_{i:02d}" for i in range(12)]
    frame = (62.0, 12.0, 548.0, 322.0)
    places = svg.place_labels(points, labels, frame)
    boxes = [svg.text_box(x, y, label) for (x, y), label in zip(places, labels, strict=True)]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert sum(svg.overlap(a, b) > 0 for a, b in pairs) == 0
    assert all(frame[0] <= b[0] and b[2] <= frame[2] for b in boxes)


def test_ticks_are_round_and_inside() -> None:
    scale = svg.Scale(0.613, 0.871, 0.0, 100.0)
    assert scale.ticks() == pytest.approx([0.65, 0.7, 0.75, 0.8, 0.85])
    log = svg.Scale(900.0, 2.3e7, 0.0, 100.0, log=True)
    assert log.ticks() == pytest.approx([1e3, 1e4, 1e5, 1e6, 1e7])
    assert svg.scale_over([3.0, 3.0], 0.0, 1.0)(3.0) == pytest.approx(0.5)


def test_numbers_read_well() -> None:
    assert [text.count(n) for n in (None, 0, 950, 12_340, 999_999, 4.56e6)] == [
        "\u2013", "0", "950", "12.3k", "1.00M", "4.56M",
    ]  # fmt: skip
    assert [text.size(n) for n in (512, 2048, 5 << 20, 3 << 30)] == [
        "512 B", "2.00 KiB", "5.00 MiB", "3.00 GiB",
    ]  # fmt: skip
    assert [text.seconds(n) for n in (0.045, 3.21, 125, 4800)] == [
        "45 ms", "3.21 s", "2 min 05 s", "80 min 00 s",
    ]  # fmt: skip
    assert text.seconds(7260) == "2 h 01 min"
    assert text.score(-0.0004, 3, signed=True) == "0.000"
    assert text.score(-0.0126, 3, signed=True) == "\u22120.013"
    assert text.clean("a\x1b[2Jb\u202e\n") == "a\\x1b[2Jb\\u202e "
