"""The results of a task as a table, its columns defined once for every output; the overview of a suite."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftree import text
from peftree.bench.intervals import Interval
from peftree.evaluate.subject import Unmeasured
from peftree.report.data import Overview, Report, Row, Task
from peftree.table import NOTHING, Cell, Head, Line, Table, number

NAME = Head("Method", numeric=False)


@dataclass(frozen=True)
class Column:
    """A column: its title, what it means, and how a row fills it."""

    name: str
    title: str
    meaning: str
    cell: Callable[[Task, Row], Cell]
    numeric: bool = True


def _method(_: Task, row: Row) -> Cell:
    some = f"{row.failed} of {text.plural(len(row.runs), 'run')} {_ended(row)}" if row.failed else ""
    return Cell(row.label, some, row.label, href=f"#{method_anchor(row.method)}")


def _ended(row: Row) -> str:
    """Return how the runs without a score ended, in one word if all ended the same way."""
    ends = {run.status for run in row.runs} - {"ok"}
    return {"inapplicable": "not applicable"}.get(word := ends.pop(), word) if len(ends) == 1 else "without a score"


def _trainable(_: Task, row: Row) -> Cell:
    share = text.percent(row.share) if row.share is not None else ""
    return Cell(text.count(row.trainable), share, row.trainable)


def _score(task: Task, row: Row) -> Cell:
    if row.score is None:
        return Cell(row.verdict or "failed")
    ends = interval(row.score, task.decimals)
    if len(task.rows) == 1 and row.before is not None:  # with several methods there is the baseline to compare with
        ends += f", base {text.score(row.before, task.decimals)}"
    return number(row.score.value, task.decimals, sub=ends)


def _difference(task: Task, row: Row) -> Cell:
    return measured(row.difference, task.decimals, signed=True)


def _verdict(_: Task, row: Row) -> Cell:
    sub = "" if row.p_holm is None else f"p = {row.p_holm:.2g}"
    judged = {True: " (better)", False: " (worse)", None: ""}[row.better]
    css = {True: "better", False: "worse", None: "tie"}[row.better]
    return Cell(f"{row.verdict}{judged}" or text.NONE, sub, row.verdict, f"v {css}")


def _relative(_: Task, row: Row) -> Cell:
    part = row.relative
    if part is None:
        return Cell(text.NONE)
    value = whole_percent(part.value)
    ends = f"[{whole_percent(part.low)}, {whole_percent(part.high)}]" if part.known else ""
    mark = {"yes": " \u2713", "no": " \u2717"}.get(row.retained, "")
    return Cell(
        f"{value} %{mark}", ends or "no interval", part.value, {"yes": "better", "no": "worse"}.get(row.retained, "")
    )


def whole_percent(part: float) -> str:
    """Return a share in whole percent, without the sign for it."""
    return text.score(part * 100, 0)


def _peak(_: Task, row: Row) -> Cell:
    share = f"{text.percent(row.peak_share)} of full" if row.peak_share is not None else ""
    return Cell(text.size(row.costs.peak_rss_bytes), share, row.costs.peak_rss_bytes)


def _train(_: Task, row: Row) -> Cell:
    step = f"{text.seconds(row.costs.step_seconds)}/step" if row.costs.step_seconds is not None else ""
    return Cell(text.seconds(row.costs.train_seconds), step, row.costs.train_seconds)


COLUMNS = (
    Column("method", "Method", "The method, with its settings where several were run; all are under Records.", _method,
           numeric=False),
    Column("branch", "Branch", "Its branch of the taxonomy.",
           lambda _, row: Cell(row.branch, "", row.branch, "branch"), numeric=False),
    Column("trainable", "Trainable", "Trainable parameters, and their share of all.", _trainable),
    Column("score", "Score", "Mean over seeds and test items, with its 95 % interval.", _score),
    Column("difference", "Against full", "Score minus full fine-tuning's on the same seeds and "
           "test items, with its 95 % interval.", _difference),
    Column("verdict", "Verdict", "\u201cno difference shown\u201d where that interval holds 0; p "
           "of a paired permutation test (McNemar's for one seed of right or wrong answers), corrected "
           "by Holm.", _verdict, numeric=False),
    Column("relative", "Relative", "(score - baseline) / (full - baseline), with its 95 % "
           "interval. \u2713: at least 90 % is shown (the lower end reaches it), \u2717: refuted, no "
           "mark: open.", _relative),
    Column("peak", "Peak memory", "Peak resident memory of the run's process (median over seeds), "
           "and its share of full fine-tuning's.", _peak),
    Column("train", "Train time", "Time spent training (median over seeds), and the median "
           "step.", _train),
    Column("disk", "On disk", "Bytes of what is saved for one task.",
           lambda _, row: Cell(text.size(row.costs.adapter_bytes), "", row.costs.adapter_bytes)),
)  # fmt: skip


def heading(column: Column, task: Task) -> str:
    """Return the column's title on this task: the score's column names the metric."""
    return task.metric if column.name == "score" else column.title


def direction(task: Task) -> str:
    """Say which way the metric is better."""
    return f"{task.metric}, {'higher' if task.higher_is_better else 'lower'} is better"


def method_anchor(method: str) -> str:
    """Return the id of a method's section.

    >>> method_anchor("lora"), method_anchor("a <b>")
    ('method-lora', 'method-a--b-0ea4')
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", method)
    return f"method-{plain}" if plain == method else f"method-{plain}{zlib.crc32(method.encode()) & 0xFFFF:04x}"


def results(task: Task) -> Table:
    """Return the table of a task, best method first."""
    caption = f"{task.name}: {direction(task)}. Second lines hold shares, 95 % intervals and Holm-corrected p."
    heads = tuple(Head(heading(c, task), c.meaning, c.numeric, c.name) for c in COLUMNS)
    lines = tuple(
        Line(
            tuple(column.cell(task, row) for column in COLUMNS), row.branch, row.share,
            "full" if row.label == task.full else "",
        )
        for row in task.rows
    )  # fmt: skip
    return Table(task.anchor, task.title, caption, heads, lines, task.notes, "results")


def overview_table(overview: Overview, report: Report) -> Table:
    """Return the grid of methods and tasks: relative scores, what is kept of full's gain, memory."""
    tasks = [task for task in report.tasks if task.anchor in overview.tasks]
    ranks = dict(zip(overview.ranks.names, overview.ranks.means, strict=True)) if overview.ranks else {}
    heads = [
        Head("Method", "The method, with its settings where several were run.", numeric=False),
        Head("Mean rank", "Mean rank of the score over all tasks, 1 being best."),
        Head(
            "\u2265 90 % kept",
            "On how many tasks it is shown that at least 90 % of full's gain is kept, of those judged.",
        ),
        Head("Memory", "Peak memory over full fine-tuning's, median over the tasks."),
        *(Head(t.name, f"{t.title}: relative score", True, t.anchor, t.modality) for t in tasks),
    ]
    lines = []
    for label in overview.labels:
        found = [task.row(label) for task in tasks]
        rows = [row for row in found if row is not None]
        judged = [row.retained for row in rows if row.retained]
        shares = sorted(row.peak_share for row in rows if row.peak_share is not None)
        middle = shares[len(shares) // 2] if shares else None
        kept = judged.count("yes")
        cells = [
            Cell(label, rows[0].branch, label, href=f"#{method_anchor(rows[0].method)}"),
            Cell(f"{ranks[label]:.2f}", "", ranks[label]) if label in ranks else Cell(text.NONE),
            Cell(f"{kept} of {len(judged)}", "", kept) if judged else Cell(text.NONE),
            Cell(text.percent(middle), "", middle),
            *(_standing(task, row) for task, row in zip(tasks, found, strict=True)),
        ]
        lines.append(Line(tuple(cells), rows[0].branch, rows[0].share))
    caption = (
        "Relative score on each task, (score - baseline) / (full - baseline), with its 95 % interval. "
        "\u2713: at least 90 % is shown; \u2717: refuted; no mark: open. Without a relative score the score "
        "stands in brackets."
    )
    title = f"Overview: {overview.suite}"
    place = report.overviews.index(overview) + 1
    return Table(f"overview-{place}", title, caption, tuple(heads), tuple(lines), overview.notes, "overview")


def _standing(task: Task, row: Row | None) -> Cell:
    if row is None:
        return Cell("not run", css="none")
    if row.score is None:
        return Cell(row.verdict, css="none")
    cell = _relative(task, row)
    if row.relative is None:
        return Cell(f"({text.score(row.score.value, task.decimals)})")
    return cell


def row_table(
    task: Task,
    name: str,
    title: str,
    caption: str,
    heads: Sequence[Head],
    fill: Callable[[Row], Sequence[Cell] | None],
    probe: str = "",
) -> Table | None:
    """Return a further table of `task`: one line per row that `fill` has cells for; None if there are none."""
    lines, notes = [], []
    for row in task.scored:
        cells = fill(row)
        if cells is not None:
            first = Cell(row.label, "", row.label)
            lines.append(Line((first, *cells), css="full" if row.label == task.full else ""))
        elif isinstance(found := row.probes.get(probe), Unmeasured):
            notes.append(f"{row.label}: not measured. {text.clean(found.why)}")
    if not lines:
        return None
    return Table(f"{task.anchor}-{name}", title, caption, (NAME, *heads), tuple(lines), tuple(notes))


def measured(found: Interval | None, decimals: int, *, signed: bool = False) -> Cell:
    """Return a cell with a figure and its interval, a dash for None."""
    if found is None:
        return NOTHING
    return number(found.value, decimals, signed=signed, sub=interval(found, decimals, signed=signed))


def interval(ends: Interval | None, decimals: int, *, signed: bool = False) -> str:
    """Return ``[low, high]``, or words that say that there is none."""
    if ends is None or not ends.known:
        return "no interval"
    low = text.score(ends.low, decimals, signed=signed)
    return f"[{low}, {text.score(ends.high, decimals, signed=signed)}]"
