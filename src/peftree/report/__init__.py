"""From a folder of run records to a terminal table, Markdown, LaTeX, JSON and one HTML page."""

from __future__ import annotations

from pathlib import Path

from peftree.files import atomic_write
from peftree.report import page, terminal
from peftree.report.build import build
from peftree.report.data import Report
from peftree.report.markup import to_json, to_latex, to_markdown
from peftree.runs.read import read_results

__all__ = ["Report", "build", "page", "terminal", "to_json", "to_latex", "to_markdown", "write"]


def write(folder: str | Path, out: str | Path) -> Path:
    """Read the run records of `folder`, which `read_results` takes, write the HTML report to `out` and return its path.

    Raises:
        DataError: the folder holds no records, or a bad one (file and field are named).
    """
    return atomic_write(out, page.render(build(read_results(Path(folder)))))
