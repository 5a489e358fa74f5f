"""Write the README's generated parts from the code and the study: `python tools/readme.py` (--check only compares)."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from peftree import describe

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"


def methods() -> str:
    """Return the methods by branch, one row a branch, as Markdown."""
    lines = ["| branch | methods |", "|---|---|"]
    for branch, rows in groupby(describe.method_rows(), key=lambda row: row["branch"]):
        lines.append(f"| {branch} | {' '.join('`' + row['name'] + '`' for row in rows)} |")
    return "\n".join(lines)


def facts() -> str:
    """Return three measured facts about peftree and Hugging Face PEFT from the stored results."""
    steps = {(s["shape"], s["method"]): s for s in json.loads((DOCS / "bench-step.json").read_text("utf-8"))["steps"]}
    lora, dora = (steps["whole", f"{name} all"] for name in ("lora", "dora"))
    files = json.loads((DOCS / "peft-files.json").read_text("utf-8"))
    read = Counter(found for found, _ in files["read"].values())
    sure = read["right"] + read["refused"] + read["wrong"]
    everything = re.search(r"^\| all \|.*", (DOCS / "models.md").read_text("utf-8"), re.MULTILINE)
    assert everything is not None
    linear, attention = re.findall(r"(\d+ of \d+) \(", everything[0])[:2]
    return f"""\
* **A training step** of SmolLM2-135M, adapters on all linear layers, compared with Hugging Face PEFT {files["peft"]}:
  LoRA takes {lora["peak_ratio"]:.2f} of the peak memory and {_time(lora)}; DoRA takes
  {dora["peak_ratio"]:.2f} of the peak memory and {_time(dora)} ([side-by-side measurements](docs/bench-step.md)).
* **PEFT adapter files**: of {sure} cases that PEFT itself supports, {read["right"]} reproduce its outputs within 1e-5,
  {read["refused"]} are refused with a reason, {read["wrong"]} are wrong ([the matrix](docs/peft-files.md)).
* **Models**: LoRA is correct on the linear layers of {linear} classes in transformers' auto mappings that have any, and
  on the attention of {attention} ([each class](docs/models.md))."""


def _time(step: dict[str, Any]) -> str:
    """Say the ratio of times, if it is outside the noise of the same model measured twice."""
    low, high = step["noise_quartiles"]
    noise = low <= step["time_ratio"] <= high
    return "the same time within noise" if noise else f"{step['time_ratio']:.2f} of the time"


def study() -> str:
    """Return the summary of the study's page."""
    _, _, rest = (DOCS / "study.md").read_text("utf-8").partition("## In short\n\n")
    return rest.partition("\n\n")[0]


def current(text: str) -> str:
    """Return `text` with the parts between the marks regenerated."""
    for name, part in (("facts", facts), ("methods", methods), ("study", study)):
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
