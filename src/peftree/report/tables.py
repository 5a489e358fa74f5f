"""The columns of a comparison, defined once for the page, the terminal, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peftree.report import text
from peftree.report.data import Report, Row, Task

Key = float | str | None


@dataclass(frozen=True)
class Cell:
    """A table cell: the figure, a second line that qualifies it, and what to sort by."""

    main: str
    sub: str = ""
    key: Key = None


@dataclass(frozen=True)
class Column:
    """A column: its title, what it means, and how a row fills it."""

    name: str
    title: str
    meaning: str
    cell: Callable[[Task, Row], Cell]
    numeric: bool = True


def _method(_: Task, row: Row) -> Cell:
    some = f"{row.failed} of {text.plural(len(row.runs), 'run')} failed" if row.failed else ""
    return Cell(row.label, some, row.label)


def _branch(_: Task, row: Row) -> Cell:
    return Cell(row.branch, "", row.branch)


def _trainable(_: Task, row: Row) -> Cell:
    share = text.percent(row.share) if row.share is not None else ""
    return Cell(text.count(row.trainable), share, row.trainable)


def _score(task: Task, row: Row) -> Cell:
    if row.score is None:
        return Cell("failed")
    ends = text.interval(row.score, task.decimals)
    return Cell(text.score(row.score.value, task.decimals), ends, row.score.value)


def _difference(task: Task, row: Row) -> Cell:
    gap = row.difference
    if gap is None:
        return Cell(text.NONE)
    value = text.score(gap.value, task.decimals, signed=True)
    return Cell(value, text.interval(gap, task.decimals, signed=True), gap.value)


def _verdict(_: Task, row: Row) -> Cell:
    sub = "" if row.p_holm is None else f"p = {row.p_holm:.2g}"
    judged = {True: " (better)", False: " (worse)", None: ""}[row.better]
    return Cell(f"{row.verdict}{judged}" or text.NONE, sub, row.verdict)


def _relative(_: Task, row: Row) -> Cell:
    part = row.relative
    if part is None:
        return Cell(text.NONE)
    value = _whole_percent(part.value)
    ends = f"[{_whole_percent(part.low)}, {_whole_percent(part.high)}]" if part.known else ""
    return Cell(f"{value} %", ends or "no interval", part.value)


def _whole_percent(part: float) -> str:
    return text.score(part * 100, 0)


def _peak(_: Task, row: Row) -> Cell:
    share = f"{text.percent(row.peak_share)} of full" if row.peak_share is not None else ""
    return Cell(text.size(row.costs.peak), share, row.costs.peak)


def _train(_: Task, row: Row) -> Cell:
    step = f"{text.seconds(row.costs.step)}/step" if row.costs.step is not None else ""
    return Cell(text.seconds(row.costs.train), step, row.costs.train)


def _disk(_: Task, row: Row) -> Cell:
    return Cell(text.size(row.costs.disk), "", row.costs.disk)


COLUMNS = (
    Column("method", "Method", "The method, with its settings where several were run.", _method,
           numeric=False),
    Column("branch", "Branch", "Its branch of the taxonomy.", _branch, numeric=False),
    Column("trainable", "Trainable", "Trainable parameters, and their share of all.", _trainable),
    Column("score", "Score", "Mean over seeds and test items, with its 95 % interval.", _score),
    Column("difference", "Against full", "Score minus full fine-tuning's on the same seeds and "
           "test items, with its 95 % interval.", _difference),
    Column("verdict", "Verdict", "\u201cno difference shown\u201d where that interval holds 0; p "
           "of a paired permutation test, corrected by Holm.", _verdict, numeric=False),
    Column("relative", "Relative", "(score - baseline) / (full - baseline), with its 95 % "
           "interval.", _relative),
    Column("peak", "Peak memory", "Peak resident memory of the run's process (median over seeds), "
           "and its share of full fine-tuning's.", _peak),
    Column("train", "Train time", "Time spent training (median over seeds), and the median "
           "step.", _train),
    Column("disk", "On disk", "Bytes of what is saved for one task.", _disk),
)  # fmt: skip


def heading(column: Column, task: Task) -> str:
    """Return the column's title on this task: the score's column names the metric."""
    return task.metric if column.name == "score" else column.title


def direction(task: Task) -> str:
    """Say which way the metric is better."""
    return f"{task.metric}, {'higher' if task.higher_is_better else 'lower'} is better"


def to_markdown(report: Report) -> str:
    """Return the report as Markdown: the summary, a table and its statement for each task."""
    parts = [report.summary]
    for task in report.tasks:
        parts.append(f"## {escape_markdown(task.title)}\n\n{escape_markdown(task.statement)}")
        parts.append(_markdown_table(task))
        if task.notes:
            parts.append("\n".join(f"- {escape_markdown(note)}" for note in task.notes))
    if report.failures:
        rows = ["## Failures"]
        rows += [f"- {escape_markdown(f'{f.task}, {f.method}, seed {f.seed}: {f.error}')}" for f in report.failures]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _markdown_table(task: Task) -> str:
    heads = [escape_markdown(heading(column, task)) for column in COLUMNS]
    rules = ["--:" if column.numeric else "---" for column in COLUMNS]
    lines = [heads, rules]
    for row in task.rows:
        cells = [column.cell(task, row) for column in COLUMNS]
        lines.append([escape_markdown(f"{cell.main} {cell.sub}".strip()) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(raw: str) -> str:
    """Return `raw` with everything that Markdown or HTML would act on made literal."""
    one_line = " ".join(raw.split())
    out = "".join(f"\\{char}" if char in "\\`*_[]|#~!" else char for char in one_line)
    return out.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_json(report: Report) -> str:
    """Return the report's figures as JSON; numbers that are not finite become null."""
    out = {
        "suites": report.suites,
        "summary": report.summary,
        "runs": report.runs,
        "tasks": [dataclasses.asdict(task) for task in _without_curves(report)],
        "failures": [dataclasses.asdict(failure) for failure in report.failures],
        "environments": [{"runs": env.runs, "facts": dict(env.facts)} for env in report.environments],
    }
    return json.dumps(_plain(out), allow_nan=False, indent=1, ensure_ascii=False)


def _without_curves(report: Report) -> list[Task]:
    """Leave the curves out: the records hold them in full."""
    return [
        dataclasses.replace(task, rows=tuple(dataclasses.replace(row, curves=()) for row in task.rows))
        for task in report.tasks
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "curves"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
