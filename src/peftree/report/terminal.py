"""The report in a terminal: one table per task, fitted to the width, safe to print."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftree.report.data import Overview, Report, Row, Task
from peftree.report.tables import COLUMNS, Column, direction, heading, overview_table
from peftree.text import clean

STYLES = {"no difference shown": "green", "failed": "red", "reference": "bold"}
# The narrow table stacks several columns in one: a heading and the columns it holds.
NARROW = {
    "Method": ("method", "branch"),
    "Params": ("trainable",),
    "Score": ("score",),
    "Against full": ("difference", "verdict"),
    "Relative": ("relative",),
    "Memory\ntime\ndisk": ("peak", "train", "disk"),
}
LEFT = ("Method", "Branch", "Verdict")
BY_NAME = {column.name: column for column in COLUMNS}


def _table(show_lines: bool = False) -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_lines=show_lines)


class TaskTable:
    """A task's table: one line per method if the terminal is wide enough, else stacked cells."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table that fits this width."""
        wide = self._wide()
        needed = console.measure(wide, options=options.update(width=10_000)).maximum
        yield Text(self.task.title, style="bold")
        yield wide if needed <= options.max_width else self._narrow()
        yield Text(direction(self.task), style="dim")

    def _wide(self) -> Table:
        table = _table()
        for column in COLUMNS:
            title = Text(heading(column, self.task))
            table.add_column(title, justify="right" if column.numeric else "left", no_wrap=True)
        for row in self.task.rows:
            cells = [_cell(column, self.task, row, " ") for column in COLUMNS]
            table.add_row(*cells, style=self._style(row))
        return table

    def _narrow(self) -> Table:
        table = _table(show_lines=True)
        for title, names in NARROW.items():
            shown = heading(BY_NAME[names[0]], self.task) if title == "Score" else title
            side: Literal["left", "right"] = "left" if title in LEFT else "right"
            table.add_column(Text(shown), justify=side, overflow="fold")
        for row in self.task.rows:
            stacks = [
                Text("\n").join(_cell(BY_NAME[name], self.task, row, "\n") for name in names)
                for names in NARROW.values()
            ]
            table.add_row(*stacks, style=self._style(row))
        return table

    def _style(self, row: Row) -> str:
        return "bold" if row.label == self.task.full else ""


def _cell(column: Column, task: Task, row: Row, between: str) -> Text:
    """Return a cell; stacked cells leave out what takes width and is said elsewhere."""
    cell = column.cell(task, row)
    style = ""
    if column.name == "verdict":
        style = STYLES.get(row.verdict, "" if row.better is None else "yellow")
    out = Text(cell.main, style=style)
    if cell.sub and not (between == "\n" and column.name in ("verdict", "train")):
        sub = cell.sub.removesuffix(" of full") if between == "\n" else cell.sub
        out.append(between + sub, style="dim")
    return out


def _overview(overview: Overview, report: Report) -> list[RenderableType]:
    """Return the overview without its task columns, which the tables below hold."""
    whole = overview_table(overview, report)
    few = len(whole.heads) - len(overview.tasks)
    table = _table()
    for head in whole.heads[:few]:
        table.add_column(Text(head.title), justify="right" if head.numeric else "left", overflow="fold")
    for line in whole.lines:
        table.add_row(*(Text(cell.main) for cell in line.cells[:few]))
    notes = list(whole.notes)
    if overview.ranks:
        notes.insert(
            0, f"mean ranks closer than {overview.ranks.critical:.2f} are not told apart (Nemenyi, level .05)."
        )
    said = [Text(f"Note: {note}", style="dim") for note in notes]
    return [Text(whole.title, style="bold"), table, *said, Text("")]


def render(report: Report) -> RenderableType:
    """Return the whole report: summary, overview, a table with statement and notes per task, failures."""
    parts: list[RenderableType] = [Text(line) for line in (report.summary, *report.headlines, "")]
    for overview in report.overviews:
        parts += _overview(overview, report)
    for task in report.tasks:
        table = TaskTable(task) if task.rows else Text(task.title, style="bold")
        parts += [table, Padding(Text(task.statement), (1, 0, 0, 0))]
        parts += [Text(f"Note: {note}", style="dim") for note in task.notes]
        parts.append(Text(""))
    if report.failures:
        parts.append(Text("Runs without a score", style="bold red"))
    for failure in report.failures:
        lines = failure.error.strip().splitlines() or [""]
        said = clean(lines[-1], limit=200)
        parts.append(Text(f"  {failure.task}, {failure.method}, seed {failure.seed}, {failure.status}: {said}"))
    return Group(*parts)
