"""One section per method: its results on every task."""

from __future__ import annotations

from dataclasses import replace

from peftree import text
from peftree.catalogue import BRANCHES
from peftree.report import tables
from peftree.report.data import Report, Row, Task
from peftree.table import Cell, Head, Line, Table

# Of the results table; the first column is the task here.
SHOWN = ("score", "difference", "verdict", "relative", "trainable", "peak")


def sections(report: Report) -> list[tuple[str, Table]]:
    """Return branch and table of each method in the order of the taxonomy: a line per task and setting."""
    found: dict[str, list[tuple[Task, Row]]] = {}
    for task in report.tasks:
        for row in task.rows:
            found.setdefault(row.method, []).append((task, row))
    order = sorted(found, key=lambda method: (BRANCHES.index(found[method][0][1].branch), method))
    return [(found[method][0][1].branch, _table(method, found[method])) for method in order]


def _table(method: str, rows: list[tuple[Task, Row]]) -> Table:
    columns = [column for column in tables.COLUMNS if column.name in SHOWN]
    heads = [Head("Task", numeric=False), *(Head(c.title, c.meaning, c.numeric, c.name) for c in columns)]
    lines = []
    for task, row in rows:
        first = Cell(task.name, row.label if row.label != method else task.metric, task.name, href=f"#{task.anchor}")
        cells = [replace(column.cell(task, row), href="") for column in columns]
        lines.append(Line((first, *cells)))
    caption = f"{method}: {text.plural(len(rows), 'result')}. The runs of each are listed under its task in Records."
    return Table(tables.method_anchor(method), method, caption, tuple(heads), tuple(lines))
