"""The report as one self-contained HTML page: styles, script and figures are inside."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from peftree import text as words
from peftree.catalogue import BRANCHES
from peftree.report import diagrams, panels, plots, svg, tables, task_tables
from peftree.report.data import Report, Task
from peftree.report.methods import sections
from peftree.table import BUDGETS, Cell, Line, Table, budget

HERE = Path(__file__).parent
BUDGET_NAMES = tuple(name for _, name in BUDGETS)
UNFOLDED = 4  # tasks up to which curves and further tables stand open
MODALITIES = ("language", "vision", "vision-language")


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(report: Report) -> str:
    """Return the page. Everything that comes from records is escaped.

    A content security policy in the page forbids every request and every script but the page's
    own (named by its hash), so even an escaping error could not load or run anything.
    """
    views = [_view(task, report) for task in report.tasks]
    script = (HERE / "page.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            report=report,
            views=views,
            unfolded=Markup(" open" if len(report.tasks) <= UNFOLDED else ""),
            terms=_terms(each for task in report.tasks for each in task_tables.tables(task)),
            overviews=[
                (tables.overview_table(each, report), diagrams.critical_difference(each, report))
                for each in report.overviews
            ],
            methods=sections(report),
            columns=tables.COLUMNS,
            direction=tables.direction,
            tags=_tags,
            plain=_plain,
            budgets=BUDGET_NAMES,
            choices={
                "branch": _present([row.branch for task in report.tasks for row in task.rows], BRANCHES),
                "modality": _present([task.modality for task in report.tasks], MODALITIES),
                "budget": _present([budget(row.share) for task in report.tasks for row in task.rows], BUDGET_NAMES),
            },
            style=Markup("".join((HERE / name).read_text("utf-8") for name in ("figure.css", "page.css"))),
            script=Markup(script),
            script_hash=digest,
            symbol=symbol,
            symbols=svg.symbols(),
            words=words,
        )
    )


def _view(task: Task, report: Report) -> dict[str, object]:
    """Return a task with its figures, further tables and the branches that occur in it."""
    figures = [*plots.figures(task), diagrams.retention(task)]
    return {
        "task": task,
        "table": tables.results(task),
        "figures": [figure for figure in figures if figure is not None],
        "panels": panels.panels(task, report),
        "extras": task_tables.tables(task),
        "branches": _present([row.branch for row in task.rows], BRANCHES),
        "runs": len({run.key for row in task.rows for run in row.runs}),
        "trials": sum(len(one.trials) for one in task.tuning),
    }


def _tags(line: Line) -> str:
    """Return what the script filters a line by: its branch and the number of its budget class."""
    found = budget(line.share)
    return f"{line.branch} {BUDGET_NAMES.index(found)}" if found else line.branch


def _terms(found: Iterable[Table]) -> dict[str, str]:
    """Return the headings of the further tables that need an explanation, with their meaning."""
    names = {head.title: head.meaning for table in found for head in table.heads if head.meaning and not head.own}
    return dict(sorted(names.items()))


def _present(found: Iterable[str], order: Sequence[str]) -> list[str]:
    """Return those of `order` that were found."""
    there = set(found)
    return [each for each in order if each in there]


def symbol(branch: str) -> Markup:
    """Return a branch's symbol for a legend or a table cell."""
    return Markup(f'<svg class="sym" viewBox="0 0 16 16" aria-hidden="true">{svg.marker(branch, 8, 8)}</svg>')


def _plain(cell: Cell) -> bool:
    """Return whether a cell's text is the number that it is sorted by, up to the digits shown."""
    return re.fullmatch(r"[+\u2212-]?\d+(\.\d+)?", cell.main) is not None
