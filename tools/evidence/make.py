"""Make the adviser's evidence and the figures in docs/advice.md: `python -m tools.evidence.make` (--check compares).

From the packed study (docs/study/small.jsonl.gz, or --study PLACE) comes src/peftree/advise/evidence/study.json;
with --peft CLONE, a clone of huggingface/peft, peft.json too. Then the part of docs/advice.md between the marks is
written again from both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tools.evidence import regret
from tools.evidence.derive import study
from tools.evidence.published import SUITES, published

from peftree.advise.rank import Evidence
from peftree.advise.table import FOLDER, Table, read_table
from peftree.files import atomic_write
from peftree.runs.read import read_results

HERE = Path(__file__).parents[2]
PACK = HERE / "docs" / "study" / "small.jsonl.gz"
PAGE = HERE / "docs" / "advice.md"
STUDY, PEFT = FOLDER / "study.json", FOLDER / "peft.json"
START, END = "<!-- figures:start -->", "<!-- figures:end -->"


def from_clone(clone: Path) -> Table:
    """Return the table of the published results in a clone."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(clone), *words], capture_output=True, text=True, check=True).stdout

    results = {}
    for suite in SUITES:
        names = git("ls-tree", "-r", "--name-only", "HEAD", f"method_comparison/{suite}/results/").split("\n")
        results[suite] = [json.loads(git("show", f"HEAD:{name}")) for name in names if name.endswith(".json")]
    return published(git("rev-parse", "HEAD").strip(), results)


def written(table: Table) -> str:
    """Return a table as JSON, one result per line."""
    plain = table.model_dump(mode="json", exclude_defaults=True)
    contexts = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in plain["contexts"].items())
    results = ",\n".join(f"  {json.dumps(row)}" for row in plain["results"])
    start = f'{{\n "origin": {json.dumps(table.origin)},\n "contexts": {{\n{contexts}\n }},\n'
    return start + f' "results": [\n{results}\n ]\n}}\n'


def percent(value: float | None) -> str:
    """Return a share for the page."""
    return "" if value is None else f"{value:.1%}"


def figures() -> str:
    """Return the generated part of the page."""
    peft = read_table(PEFT)
    ours = read_table(STUDY) if STUDY.exists() else None
    lines = [f"Evidence: {peft.origin}" + (f"; {ours.origin}." if ours else "; no study of our own yet.")]
    tables = tuple(t for t in (ours, peft) if t)
    mu, sigma, tau = Evidence(tables).spread
    lines += [f"Fitted: mu {mu:.2f}, sigma {sigma:.2f} between tasks, tau {tau:.2f} between methods.", ""]
    found = regret.evaluate(ours, (peft,)) if ours else []
    if not found or ours is None:
        return "\n".join([*lines, "No task of our own has finished yet: the ranking has not been evaluated."])
    head = ["task", "methods", "best", "advice, top 1", "advice, top 3", "top 3, tasks alike"]
    head += ["LoRA", "LoRA, all linear", "random, 1", "random, best of 3", "the three"]
    lines += [f"| {' | '.join(head)} |", "|---|---:|---|" + "---:|" * 7 + "---|"]
    for r in found:
        cells = [percent(getattr(r, name)) for name in regret.FIGURES]
        lines.append(
            f"| {r.task} | {r.methods} | `{r.best}` | {' | '.join(cells)} | {', '.join(f'`{c}`' for c in r.chosen)} |"
        )
    means = [percent(regret.mean(found, name)) for name in regret.FIGURES]
    lines += [f"| **mean of {len(found)}** | | | {' | '.join(f'**{m}**' if m else '' for m in means)} | |", ""]
    told = regret.agreement(ours, peft)
    if told:
        lines.append(
            f"Against published results: estimates from our own study alone and the relative scores of {told[1]} "
            f"configurations in Hugging Face PEFT's comparison correlate with {told[0]:+.2f} (Spearman)."
        )
    return "\n".join(lines)


def current(text: str) -> str:
    """Return the page with its generated part made again."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{figures()}\n\n{END}{after}"


def main() -> int:
    """Make all of it, or with --check say whether it is current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=PACK, help="a pack or a folder of records")
    parser.add_argument("--peft", type=Path, help="a clone of huggingface/peft")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if something is not current")
    told = parser.parse_args()
    if told.check:
        stale = current(PAGE.read_text("utf-8")) != PAGE.read_text("utf-8")
        if PACK.exists():
            stale |= not STUDY.exists() or written(study(read_results(PACK))) != STUDY.read_text("utf-8")
        return int(stale)
    if told.peft:
        atomic_write(PEFT, written(from_clone(told.peft)))
    if told.study.exists():
        atomic_write(STUDY, written(study(read_results(told.study))))
    PAGE.write_text(current(PAGE.read_text("utf-8")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
