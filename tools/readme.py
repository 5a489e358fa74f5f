"""Write the README's generated parts from the code: `python tools/readme.py` (with --check only compare)."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from peftree import describe

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- methods:start -->", "<!-- methods:end -->"


def table() -> str:
    """Return the methods by branch, one row a branch, as Markdown."""
    lines = ["| branch | methods |", "|---|---|"]
    for branch, rows in groupby(describe.method_rows(), key=lambda row: row["branch"]):
        lines.append(f"| {branch} | {' '.join('`' + row['name'] + '`' for row in rows)} |")
    return "\n".join(lines)


def current(text: str) -> str:
    """Return `text` with the part between the marks made anew."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def main() -> int:
    """Write the file, or with --check say whether it is current."""
    text = README.read_text("utf-8")
    fresh = current(text)
    if "--check" in sys.argv:
        return int(fresh != text)
    README.write_text(fresh, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
