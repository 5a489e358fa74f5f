"""Write the README's generated parts from the code and the study: `python tools/readme.py` (--check only compares)."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from peftree import describe

README = Path(__file__).parents[1] / "README.md"
STUDY = README.parent / "docs" / "study.md"


def methods() -> str:
    """Return the methods by branch, one row a branch, as Markdown."""
    lines = ["| branch | methods |", "|---|---|"]
    for branch, rows in groupby(describe.method_rows(), key=lambda row: row["branch"]):
        lines.append(f"| {branch} | {' '.join('`' + row['name'] + '`' for row in rows)} |")
    return "\n".join(lines)


def study() -> str:
    """Return what the study's page says in short."""
    _, _, rest = STUDY.read_text("utf-8").partition("## In short\n\n")
    return rest.partition("\n\n")[0]


def current(text: str) -> str:
    """Return `text` with the parts between the marks made anew."""
    for name, part in (("methods", methods), ("study", study)):
        start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{part()}\n{end}{rest.partition(end)[2]}"
    return text


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
