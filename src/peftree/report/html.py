"""The report as one HTML page that asks for nothing: styles, script and figures are inside."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from peftree.report import curves, plots, svg, tables
from peftree.report import text as words
from peftree.report.data import BRANCHES, Report, Task

HERE = Path(__file__).parent


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
    own (named by its hash), so even a fault in escaping could not load or run anything.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            report=report,
            views=[_view(task, report) for task in report.tasks],
            columns=tables.COLUMNS,
            heading=tables.heading,
            direction=tables.direction,
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=digest,
            symbol=symbol,
            words=words,
        )
    )


def _view(task: Task, report: Report) -> dict[str, object]:
    """Return a task with its drawn figures and the branches that occur in it."""
    present = {row.branch for row in task.rows}
    return {
        "task": task,
        "figures": plots.figures(task),
        "curves": curves.panels(task, report),
        "branches": [branch for branch in BRANCHES if branch in present],
    }


def symbol(branch: str) -> Markup:
    """Return a branch's symbol for a legend or a table cell."""
    return Markup(f'<svg class="sym" viewBox="0 0 16 16" aria-hidden="true">{svg.marker(branch, 8, 8)}</svg>')
