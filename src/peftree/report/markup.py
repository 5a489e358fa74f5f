"""The report as Markdown, LaTeX (booktabs) and JSON, from the same tables as the page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

from pydantic import BaseModel

from peftree.report import tables, task_tables
from peftree.report.data import Report, Task
from peftree.table import Table

# What LaTeX would act on, and signs that its default fonts lack.
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
    "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "\u2212": "$-$", "\u2013": r"\textendash{}", "\u2265": r"$\geq$",
    "\u2713": r"$\checkmark$", "\u2717": r"$\times$", "[": "{[}", "]": "{]}", "\u2026": r"\ldots{}",
}  # fmt: skip


def _all_tables(report: Report) -> list[tuple[Table, Task | None]]:
    """Return every table of the report in reading order, with the task whose results it holds."""
    out: list[tuple[Table, Task | None]] = [(tables.overview_table(o, report), None) for o in report.overviews]
    for task in report.tasks:
        out.append((tables.results(task), task))
        out += [(each, None) for each in task_tables.tables(task)]
    return out


def to_markdown(report: Report) -> str:
    """Return the report as Markdown: summary, overview, each task's tables and statement, failures."""
    parts = [escape_markdown(report.summary), *(escape_markdown(line) for line in report.headlines)]
    for table, task in _all_tables(report):
        level = "##" if task is not None or table.css == "overview" else "###"
        parts.append(f"{level} {escape_markdown(table.title)}")
        parts.append(escape_markdown(task.statement if task else table.caption))
        if table.lines:
            parts.append(_markdown(table))
        if table.notes:
            parts.append("\n".join(f"- {escape_markdown(note)}" for note in table.notes))
    if report.failures:
        rows = ["## Runs without a score"]
        rows += [
            f"- {escape_markdown(f'{f.task}, {f.method}, {f.phase} seed {f.seed}, {f.status}: {f.error}')}"
            for f in report.failures
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    lines = [[escape_markdown(head.title) for head in table.heads]]
    lines.append(["--:" if head.numeric else "---" for head in table.heads])
    lines += [[escape_markdown(f"{c.main} {c.sub}".strip()) for c in line.cells] for line in table.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(raw: str) -> str:
    """Return `raw` with everything escaped that Markdown or HTML would interpret."""
    one_line = " ".join(raw.split())
    out = "".join(f"\\{char}" if char in "\\`*_[]|#~!" else char for char in one_line)
    return out.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_latex(report: Report) -> str:
    """Return the tables of the report as LaTeX floats; they need the packages booktabs and amssymb."""
    parts = ["% Needs \\usepackage{booktabs,amssymb}. Generated from run records."]
    parts += [_latex(table, task) for table, task in _all_tables(report) if table.lines]
    return "\n\n".join(parts) + "\n"


def _latex(table: Table, task: Task | None) -> str:
    spec = "".join("r" if head.numeric else "l" for head in table.heads)
    said = ". ".join(part.rstrip(".") for part in (table.title, table.caption, *table.notes)) + "."
    lines = [
        r"\begin{table}[p]", r"\centering\small",
        rf"\caption{{{escape_latex(said)}}}\label{{tab:{re.sub(r'[^A-Za-z0-9-]', '-', table.anchor)}}}",
        rf"\begin{{tabular}}{{@{{}}{spec}@{{}}}}", r"\toprule",
        " & ".join(escape_latex(head.title) for head in table.heads) + r" \\", r"\midrule",
    ]  # fmt: skip
    for line in table.lines:
        cells = [escape_latex(f"{c.main} {c.sub}".strip()) for c in line.cells]
        if task is not None and line.css == "full":
            cells = [rf"\textbf{{{cell}}}" for cell in cells]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def escape_latex(raw: str) -> str:
    r"""Return `raw` on one line, with everything escaped that LaTeX would interpret.

    >>> escape_latex("a_b 50 % {x}")
    'a\\_b 50 \\% \\{x\\}'
    """
    return "".join(LATEX.get(char, char) for char in " ".join(raw.split())).replace("--", "-{}-")


def to_json(report: Report) -> str:
    """Return the report's figures as JSON; numbers that are not finite become null."""
    out = {
        "suites": report.suites,
        "summary": report.summary,
        "runs": report.runs,
        "overviews": [dataclasses.asdict(overview) for overview in report.overviews],
        "tasks": [_fields(task) for task in report.tasks],
        "failures": [dataclasses.asdict(failure) for failure in report.failures],
        "environments": [{"runs": env.runs, "facts": dict(env.facts)} for env in report.environments],
    }
    return json.dumps(_plain(out), allow_nan=False, indent=1, ensure_ascii=False)


def _fields(task: Task) -> dict[str, Any]:
    """Return a task without its learning curves: the records hold them in full."""
    rows = tuple(dataclasses.replace(row, curves=()) for row in task.rows)
    return dataclasses.asdict(dataclasses.replace(task, rows=rows))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(by_alias=True, exclude_none=True))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "curves"}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
