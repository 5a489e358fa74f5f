"""Write the generated parts of README.md and docs/precision.md: `python -m tools.readme` (--check only compares)."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

from tools import bench_page

from peftree import describe

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGES = (README, DOCS / "precision.md")


def methods() -> str:
    """Return the methods by branch, one row a branch, as Markdown."""
    lines = ["| branch | methods |", "|---|---|"]
    for branch, rows in groupby(describe.method_rows(), key=lambda row: row["branch"]):
        lines.append(f"| {branch} | {' '.join('`' + row['name'] + '`' for row in rows)} |")
    return "\n".join(lines)


def facts() -> str:
    """Return three measured facts about peftree and Hugging Face PEFT from the stored results."""
    files = json.loads((DOCS / "peft-files.json").read_text("utf-8"))
    read = Counter(found for found, _ in files["read"].values())
    sure = read["right"] + read["refused"] + read["wrong"]
    everything = re.search(r"^\| all \|.*", (DOCS / "models.md").read_text("utf-8"), re.MULTILINE)
    assert everything is not None
    linear, attention = re.findall(r"(\d+ of \d+) \(", everything[0])[:2]
    return f"""\
* **A training step** of SmolLM2-135M, adapters on all linear layers, compared with Hugging Face PEFT {files["peft"]}:
  {bench_page.facts(bench_page.load())}.
* **PEFT adapter files**: of {sure} cases that PEFT itself supports, {read["right"]} reproduce its outputs within 1e-5,
  {read["refused"]} are refused with a reason, {read["wrong"]} are wrong ([the matrix](docs/peft-files.md)).
* **Models**: LoRA is correct on the linear layers of {linear} classes in transformers' auto mappings that have any, and
  on the attention of {attention} ([each class](docs/models.md))."""


def study() -> str:
    """Return the summary of the study's page."""
    _, _, rest = (DOCS / "study.md").read_text("utf-8").partition("## In short\n\n")
    return rest.partition("\n\n")[0]


def speed() -> str:
    """Return the table of time and memory from the benchmark."""
    return bench_page.speed(bench_page.load())


def loss() -> str:
    """Return the paragraph about the loss without logits from the benchmark."""
    return bench_page.loss(bench_page.load())


def current(text: str) -> str:
    """Return `text` with the parts between its marks regenerated."""
    for part in (facts, methods, study, speed, loss):
        start, end = (f"<!-- {part.__name__}:{word} -->" for word in ("start", "end"))
        before, mark, rest = text.partition(start)
        if mark:
            text = f"{before}{start}\n{part()}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> int:
    """Write the files, or with --check say whether they are current."""
    texts = {path: path.read_text("utf-8") for path in PAGES}
    fresh = {path: current(text) for path, text in texts.items()}
    if "--check" in sys.argv:
        return int(fresh != texts)
    for path, text in fresh.items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
