"""The report on an invented suite: overview, trials, probes, other data, environments, every output in step."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from pydantic import JsonValue
from rich.console import Console

from invented import METHODS, STUDY, TASKS, fabricated, study
from peftree import report
from peftree.errors import DataError
from peftree.probes import interpretability, retention
from peftree.report import methods, panels, tables, task_tables
from peftree.report.data import Trial
from peftree.report.tuning import decades, steady
from peftree.runs.record import RunRecord
from peftree.table import Table


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    """Six tasks with trials, final runs, probes; one method that does not apply to images."""
    return study()


@pytest.fixture(scope="module")
def built(records: list[RunRecord]) -> report.Report:
    """The report on them."""
    return report.build(records)


@pytest.fixture(scope="module")
def page(built: report.Report) -> str:
    """Its page."""
    return report.page.render(built)


def further(built: report.Report, name: str, task: int = 0) -> Table:
    """Return a further table of a task by the last part of its anchor."""
    found = {table.anchor.removeprefix(f"task-{task + 1}-"): table for table in task_tables.tables(built.tasks[task])}
    return found[name]


def line(table: Table, method: str) -> list[str]:
    """Return the cells of one method after its name."""
    return [cell.main for cell in next(each for each in table.lines if each.cells[0].main == method).cells[1:]]


def test_the_overview_ranks_what_ran_everywhere_and_counts_what_is_kept(built: report.Report) -> None:
    (overview,) = built.overviews
    assert overview.ranks is not None and overview.ranks.tasks == 6
    assert set(overview.ranks.names) == {m[0] for m in METHODS} - {"molora"} and overview.labels[-1] == "molora"
    assert "without a score on some task: molora" in overview.notes[0] and "not independent" in overview.notes[1]
    table = tables.overview_table(overview, built)
    assert [head.modality for head in table.heads[4:]] == [task.modality for task in built.tasks]
    for each in table.lines:
        rows = [row for task in built.tasks if (row := task.row(each.cells[0].main)) is not None]
        judged = [row.retained for row in rows if row.retained]
        assert each.cells[2].main == (f"{judged.count('yes')} of {len(judged)}" if judged else "\u2013")
        assert sum(" \u2713" in cell.main for cell in each.cells[4:]) == judged.count("yes")
    assert line(table, "molora").count("inapplicable") == 2


def test_retained_follows_from_the_relative_interval(built: report.Report) -> None:
    seen = set()
    for row in (row for task in built.tasks for row in task.rows):
        if row.retained and row.relative:
            low, high = row.relative.low, row.relative.high
            assert row.retained == ("yes" if low >= 0.9 else "no" if high < 0.9 else "not shown")
            seen.add(row.retained)
    assert seen == {"yes", "no", "not shown"}
    assert all(task.row(name).retained == "" for task in built.tasks for name in ("full", "head_only"))  # type: ignore[union-attr]


def test_a_task_of_few_methods_does_not_empty_the_ranking(records: list[RunRecord]) -> None:
    first = records[0].task
    few = [r for r in records if r.task != first or r.method in {"full", "head_only"}]
    (overview,) = report.build(few).overviews
    assert overview.ranks is not None and overview.ranks.tasks == 5 and len(overview.ranks.names) == len(METHODS) - 1
    assert overview.notes[0].startswith("Ranked on ") and len(overview.tasks) == 6


def test_of_tasks_over_the_same_rows_one_is_ranked(records: list[RunRecord]) -> None:
    known = {task: f"{number}" * 64 for number, task in enumerate(dict.fromkeys(r.task for r in records))}
    first = records[0].task
    base = [r.model_copy(update={"own_data": known[r.task]}) for r in records]
    noisy = [
        r.model_copy(update={"task": "noisy", "budget": {**r.budget, "label_noise": 0.4}})
        for r in base
        if r.task == first and r.method in {"full", "head_only", "lora"}
    ]
    (plain,), (overview,) = report.build(base).overviews, report.build([*base, *noisy]).overviews
    assert overview.ranks == plain.ranks and len(overview.tasks) == len(plain.tasks) + 1
    assert overview.notes[0].startswith("Of tasks over the same rows") and "Of tasks" not in " ".join(plain.notes)
    assert "noisy" not in overview.notes[1]


def test_one_task_has_no_overview_and_two_suites_have_one_each(records: list[RunRecord]) -> None:
    alone = [r for r in records if r.task == "text-generation"]
    assert report.build(alone).overviews == ()
    both = report.build([*records, *(r.model_copy(update={"suite": "other"}) for r in records)])
    assert [o.suite for o in both.overviews] == ["fabricated", "other"]
    assert not set(both.overviews[0].tasks) & set(both.overviews[1].tasks)


def test_tasks_that_differ_in_data_alone_are_drawn_as_curves(records: list[RunRecord]) -> None:
    found = [r for r in records if r.task == "text-classification" and r.phase == "final"]
    change: dict[str, dict[str, JsonValue]] = {
        "tenth": {"share": 0.1},
        "third": {"share": 0.3},
        "noisy": {"label_noise": 0.4},
        "long": {"steps": 9},
    }
    more = [  # without the sets of the base's probes: other data files, the same rows
        r.model_copy(update={"task": name, "budget": {**r.budget, **own}, "own_data": "o" * 64, "data": "e" * 64})
        for name, own in change.items()
        for r in found
    ]
    built = report.build([*(r.model_copy(update={"own_data": "o" * 64}) for r in found), *more])
    base, *others = sorted(built.tasks, key=lambda task: task.name != "text-classification")
    share, wrong = panels.series(base, built, "share"), panels.series(base, built, "wrong")
    assert share is not None and "tenth (10%), third (30%) and text-classification (100%)" in share.caption
    assert wrong is not None and "text-classification (0%) and noisy (40%)" in wrong.caption
    assert len(share.panels) == len(base.scored) and "lora" in "".join(share.panels)
    assert all(panels.series(task, built, name) is None for task in others for name in ("share", "wrong"))
    assert "accuracy against share of wrong training labels" in report.page.render(built)


def test_tasks_that_differ_in_the_model_are_a_curve_over_its_size(records: list[RunRecord]) -> None:
    found = [r for r in records if r.task == "text-classification" and r.phase == "final"]
    total = min(r.total_parameters or 0 for r in found)
    change: dict[str, tuple[float, dict[str, JsonValue]]] = {
        "half": (0.5, {"config": {"num_hidden_layers": 3}, "weights": "other"}),
        "quarter": (0.25, {"config": {"num_hidden_layers": 1}}),
        "else": (0.1, {"config": {"hidden_dropout_prob": 0.5}}),
    }
    more = [
        r.model_copy(
            update={
                "task": name,
                "model": name,
                "total_parameters": round(part * (r.total_parameters or 0)),
                "budget": {"config": {}, **r.budget, **own},
            }
        )
        for name, (part, own) in change.items()
        for r in found
    ]
    first = [r.model_copy(update={"budget": {"config": {}, **r.budget}}) for r in found]
    built = report.build([*first, *more])
    by_name = {task.name: task for task in built.tasks}
    assert by_name["text-classification"].parameters == total
    curve = panels.series(by_name["text-classification"], built, "parameters")
    assert curve is not None and curve.caption.startswith("Over quarter (")
    assert "half (" in curve.caption and "else" not in curve.caption
    assert all(panels.series(by_name[name], built, "parameters") is None for name in change)
    assert "accuracy against parameters of the base" in report.page.render(built)


def test_a_method_of_several_sizes_is_a_curve(records: list[RunRecord]) -> None:
    found = [r for r in records if r.task == "text-classification" and r.phase == "final"]
    sizes = {32: 400, 64: 800, 128: 1600}
    more = [
        r.model_copy(update={"fields": {"r": rank}, "trainable_parameters": size})
        for rank, size in sizes.items() for r in found if r.method == "lora"
    ]  # fmt: skip
    assert panels.capacity(report.build([*found, *more[:-6]]).tasks[0]) is None
    drawn = panels.capacity(report.build([*found, *more]).tasks[0])
    assert drawn is not None and len(drawn.panels) == 1 and "lora" in drawn.panels[0]


def test_trials_are_no_results(built: report.Report, records: list[RunRecord]) -> None:
    task = built.tasks[0]
    row, one = task.row("lora"), next(t for t in task.tuning if t.label == "lora")
    assert row is not None and row.seeds == 3 and len(row.runs) == 3
    mine = [r for r in records if (r.task, r.method, r.phase) == (task.name, "lora", "trial")]
    assert {t.key for t in one.trials} == {r.key for r in mine} and len(one.trials) == 8
    assert one.best is not None and one.best.score == max(r.score for r in mine if r.score is not None)
    assert one.expected is not None and one.expected.trials == (1, 2, 3, 4)
    assert one.expected.value[0] == pytest.approx(np.mean([r.score for r in mine]))
    seconds = np.mean([(r.setup_seconds or 0) + (r.train_seconds or 0) + (r.eval_seconds or 0) for r in mine])
    assert one.expected.seconds[1] == pytest.approx(2 * seconds)


def test_a_diverged_trial_counts_as_the_worst_seen_and_is_named(built: report.Report, records: list[RunRecord]) -> None:
    task = built.tasks[0]
    mine = [r for r in records if (r.task, r.method, r.phase) == (task.name, "full", "trial")]
    lost = [r for r in mine if r.status == "diverged"]
    worst = min(r.score for r in records if r.task == task.name and r.phase == "trial" and r.score is not None)
    one = next(t for t in task.tuning if t.label == "full")
    assert len(lost) == 1 and one.expected is not None
    assert one.expected.value[0] == pytest.approx(np.mean([worst if r.score is None else r.score for r in mine]))
    assert line(further(built, "tuning"), "full")[:2] == ["8", "1"]
    assert "diverged" not in {f.status for f in built.failures}  # of trials, only failures are listed


def test_the_steady_range_by_hand() -> None:
    def tried(scores: list[float | None]) -> list[Trial]:
        return [Trial(10.0**i, s, "ok" if s is not None else "diverged", None, str(i)) for i, s in enumerate(scores)]

    trials = tried([0.96, 0.5, 0.95, 1.0, 0.99, None, 1.0])
    assert steady(trials, trials[3], True) == (100.0, 1e4)
    lower = tried([2.2, 2.0, 2.1, 3.0])
    assert steady(lower, lower[1], False) == (10.0, 100.0)


def test_decades_of_a_range(built: report.Report) -> None:
    for one in built.tasks[0].tuning:
        assert one.low is not None and one.high is not None and one.best is not None
        assert one.low <= one.best.rate <= one.high
        assert decades(one) == pytest.approx(np.log10(one.high / one.low))


def test_trials_alone_are_shown_and_said_to_be_unfinished(records: list[RunRecord]) -> None:
    built = report.build([r for r in records if r.phase == "trial"])
    task = built.tasks[0]
    assert task.rows == () and "no final run yet" in " ".join(task.notes) and task.tuning
    page = report.page.render(built)
    assert "against learning rate" in page and "There is no final run yet" in page
    for out in (report.to_markdown(built), report.to_latex(built), report.to_json(built)):
        assert out
    Console(file=io.StringIO(), width=80).print(report.terminal.render(built))


def test_a_method_that_does_not_apply_is_a_row_with_its_reason(built: report.Report, page: str) -> None:
    task = next(task for task in built.tasks if task.modality == "vision")
    row = task.row("molora")
    assert row is not None and (row.verdict, row.score) == ("inapplicable", None)
    assert "routes no image" in row.reason and "molora (inapplicable" in " ".join(task.notes)
    assert {f.status for f in built.failures} == {"inapplicable"} and "6 not applicable" in built.summary
    assert "3 of 3 runs not applicable" in page


def test_probes_are_averaged_over_seeds(built: report.Report, records: list[RunRecord]) -> None:
    runs = [r for r in records if (r.task, r.method, r.phase) == (built.tasks[0].name, "ia3", "final")]
    probes = built.tasks[0].row("ia3").probes  # type: ignore[union-attr]
    kept, inside = probes["retention"], probes["interpretability"]
    assert isinstance(kept, retention.Found) and isinstance(inside, interpretability.Found)
    mean = np.mean([r.probes["retention"]["after"] for r in runs])
    assert kept.after == pytest.approx(mean) and kept.measure == "knn accuracy"
    assert inside.intruders == {"0.5": 1.5, "0.9": 6.0}
    assert line(further(built, "calibration"), "ia3")[0] == "0.040"
    cells = line(further(built, "inside"), "ia3")
    assert cells[:4] == ["0.0400", "8.0", "1.5", "0.5: 1.5, 0.9: 6"] and cells[5] == "layer 2"


def test_what_was_not_measured_is_said(built: report.Report) -> None:
    assert "head_only: not measured. head_only changes no weight" in further(built, "inside").notes[0]
    partly = {"interpretability": {"cka": {"not measured": "tokens"}, "knockout": {"not measured": "none"}}}
    found = [r.model_copy(update={"probes": partly}) for r in fabricated(failures=False)]
    assert line(further(report.build(found), "inside"), "lora")[-3:] == ["\u2013"] * 3


def test_older_records_with_an_energy_that_was_not_measured_report_as_those_without() -> None:
    found = fabricated(failures=False)
    older = [r.model_copy(update={"probes": {**r.probes, "energy": {"not measured": "No counter."}}}) for r in found]
    assert report.build(older) == report.build(found)


@pytest.mark.parametrize(
    ("probes", "said"),
    [
        ({"calibration": {"ece": "low"}}, "probe 'calibration': ece"),
        ({"noise": {"clean": 0.9}}, "probe 'noise': severities"),
        ({"corruptions": {"clean": 0.9, "severities": []}}, "probe 'corruptions': severities"),
        ({"shift": {"x": {"items": [1.0]}}}, "probe 'shift': x.score"),
        ({"shift": {"x": 0.5}}, "probe 'shift': x"),
        ({"sequence": {"tasks": ["a", "b"], "scores": [[1.0, 1.0]]}}, "probe 'sequence': .*has no transfer"),
        ({"sequence": {"tasks": ["a", "b", "c"], "scores": [[1.0, 1.0], [1.0, 1.0]]}}, "3 tasks, 2 scores"),
        ({"sequence": {"scores": [[1.0, 1.0], [1.0, 1.0]]}}, "probe 'sequence'"),
    ],
)
def test_a_probe_of_another_form_is_refused_with_its_run(probes: dict[str, Any], said: str) -> None:
    found = fabricated(failures=False)
    bad = found[3].model_copy(update={"probes": probes})
    with pytest.raises(DataError, match=said) as error:
        report.build([*found[:3], bad, *found[4:]])
    assert bad.key in str(error.value)


def test_other_test_sets_and_sequences_have_their_tables(built: report.Report) -> None:
    task = next(i for i, task in enumerate(built.tasks) if any(row.shifted for row in task.rows))
    shift = further(built, "shift", task)
    assert [head.title for head in shift.heads[2:]] == ["other domain", "against full"]
    assert line(shift, "lora")[1:] == ["0.500", "0.000"]
    stages = built.tasks[task].row("lora").stages  # type: ignore[union-attr]
    assert stages is not None and stages.transfer.forward is None
    near = 0.02 + 0.005 * 7
    assert stages.transfer.backward == pytest.approx((-2 * near + (0.7 - 0.8)) / 2)
    cells = line(further(built, "sequence", task), "lora")
    assert cells[2] == "not measured" and cells[-1] == "0.900"


def test_costs_of_another_environment_are_blank_and_quality_stays(
    records: list[RunRecord], built: report.Report
) -> None:
    other = {"machine": "another", "threads": 64}
    found = [r.model_copy(update={"environment": other}) if r.method == "lora" else r for r in records]
    moved = report.build(found)
    for before, after in zip(built.tasks, moved.tasks, strict=True):
        one, two = before.row("lora"), after.row("lora")
        assert one is not None and two is not None and one.costs.peak_rss_bytes and "latency" in one.probes
        assert (two.costs.peak_rss_bytes, two.costs.train_seconds, two.peak_share, two.probes.get("latency")) == (
            None,
        ) * 4
        assert (two.score, two.relative) == (one.score, one.relative)
        assert two.probes.get("calibration") == one.probes.get("calibration")
        assert "2 environments. Memory and time cannot be compared" in " ".join(after.notes)
        tuned = next(t for t in after.tuning if t.label == "lora")
        assert tuned.expected is not None and tuned.expected.seconds[0] == 0.0
    assert "lora" not in {each.cells[0].main for each in further(moved, "latency").lines}


def test_one_seed_of_another_environment_leaves_the_costs_of_the_rest(records: list[RunRecord]) -> None:
    found = [
        r.model_copy(update={"environment": {"machine": "another"}, "peak_rss_bytes": 10**12}) if r.seed == 1 else r
        for r in records
    ]
    row = report.build(found).tasks[0].row("lora")
    assert (
        row is not None
        and row.costs.peak_rss_bytes is not None
        and row.costs.peak_rss_bytes < 10**11
        and row.seeds == 3
    )


def test_versions_of_the_data_are_not_mixed(records: list[RunRecord]) -> None:
    found = [r.model_copy(update={"data": "e" * 64}) if r.method == "lora" else r for r in records]
    built = report.build(found)
    assert len(built.tasks) == 12 and all("2 versions of its data" in " ".join(t.notes) for t in built.tasks)
    assert {t.dataset.rpartition(" ")[2] for t in built.tasks} == {"dddddddd)", "eeeeeeee)"}
    mixed = [r.model_copy(update={"suite_hash": "b" * 64}) if r.method == "lora" else r for r in records]
    assert "2 versions of the suite" in " ".join(report.build(mixed).tasks[0].notes)


def test_each_method_has_a_section_and_every_run_is_named(
    built: report.Report, page: str, records: list[RunRecord]
) -> None:
    found = methods.sections(built)
    assert {table.title for _, table in found} == {m[0] for m in METHODS}
    assert all(len(table.lines) == 6 for _, table in found) and '<details id="method-lora"' in page
    assert all(page.count(record.key) >= 1 for record in records)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)


def test_figures_are_there_where_the_records_hold_them(page: str) -> None:
    for title in (
        "Mean ranks with the critical difference", "Retention against gain", "accuracy against learning rate",
        "expected best accuracy against time of tuning", "severity of image corruptions", "severity of text noise",
    ):  # fmt: skip
        assert title in page
    plain = report.page.render(report.build(fabricated()))
    assert "against learning rate" not in plain and "Retention against gain" not in plain and "Tuning" not in plain


def test_markdown_latex_and_json_are_in_step(built: report.Report) -> None:
    markdown, latex, data = report.to_markdown(built), report.to_latex(built), json.loads(report.to_json(built))
    names = [table.title for task in built.tasks for table in task_tables.tables(task)]
    assert markdown.count("\n### ") == len(names) and latex.count(r"\begin{table}") == len(names) + 7
    for rows in re.findall(r"\\toprule\n(.*?)\\bottomrule", latex, re.S):
        counts = {len(re.findall(r"(?<!\\)&", row)) for row in rows.splitlines() if row != r"\midrule"}
        assert len(counts) == 1
    assert len(re.findall(r"(?<!\\)\{", latex)) == len(re.findall(r"(?<!\\)\}", latex))
    assert data["overviews"][0]["ranks"]["names"] and len(data["tasks"][0]["tuning"]) == 12
    row = data["tasks"][0]["rows"][0]
    assert row["retained"] == "" and "calibration" in row["probes"] and row["values"]["f1"] >= 0.5


def test_the_terminal_shows_the_overview_within_80_columns(built: report.Report) -> None:
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None).print(report.terminal.render(built))
    shown = stream.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert "Overview: fabricated" in shown and "Mean rank" in shown and "inapplicable" in shown


@pytest.mark.slow
def test_the_page_on_two_thousand_records_stays_below_one_and_a_half_megabytes() -> None:
    many = [{**task, "task": f"{task['task']}-{i}"} for i in range(4) for task in TASKS][:10]
    twice = [*METHODS, *((f"{m[0]}@b", *m[1:]) for m in METHODS[2:])]
    found = study(tasks=many, methods=twice, seeds=5, trials=4)
    assert len(found) == 1980 and len(STUDY) == 6
    page = report.page.render(report.build(found))
    assert len(page.encode()) < 1.5 * 2**20 and all(record.key in page for record in found)


def test_where_full_fine_tuning_is_worse_than_the_head_alone_nothing_is_said_to_be_retained() -> None:
    from peftree.bench.grouping import Sample
    from peftree.report.compare import relative

    def sample(level: float) -> Sample:
        draw = np.random.default_rng(0).normal(0, 0.01, (5, 40))
        return Sample(tuple(range(5)), draw + level, False)

    better, worse, base = sample(0.9), sample(0.5), sample(0.7)
    assert relative(sample(0.8), better, base, None, higher=True) is not None
    assert relative(sample(0.8), worse, base, None, higher=True) is None
    assert relative(sample(0.8), worse, base, None, higher=False) is not None
