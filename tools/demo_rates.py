"""The learning rates of the demo, found on validation rows: `python -m tools.demo_rates RESULTS` tries them.

Each entry of the suite `demo` is trained at some multiples of its method's default rate, with seeds that no run of the
demo has. docs/demo-rates.md is written from the records in RESULTS; the suite's `times` are copied from there by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peftree.bench.pool import run_cells
from peftree.bench.run import PRELOAD, TRIAL_SEED, Planned
from peftree.bench.sources import gather
from peftree.bench.suite import load_suite

PAGE = Path(__file__).parents[1] / "docs" / "demo-rates.md"
TIMES = {"full": (1, 2, 4), "head_only": (4, 10, 30)}
OTHERS = (2, 4, 8)
HEAD = """# The demo's learning rates

Written by `python -m tools.demo_rates`: every entry of the suite `demo` at three multiples of its method's default,
which is made for longer training, each trained once (with seeds that the demo does not use) and scored on validation
rows. The suite takes the best; no test row was looked at.

| task | method | metric | times the default: score | best |
|---|---|---|---|--:|
"""


def main(out: Path) -> None:
    """Do what is missing and write the page."""
    suite, lines = load_suite("demo"), []
    for name, task in suite.tasks.items():
        planned = Planned(suite, name, task, gather(task), out)
        tried = [(e, n) for e, entry in suite.entries(name) for n in TIMES.get(entry.method, OTHERS)]
        cells = [
            planned._cell(e, "trial", planned._rate(e, n), TRIAL_SEED + number % 3)
            for number, (e, n) in enumerate(tried)
        ]
        found = run_cells(cells, out / "records", workers=2, preload=PRELOAD)
        sign = 1.0 if task.facts.higher_is_better else -1.0
        for entry in dict.fromkeys(e for e, _ in tried):
            mine = [(n, r) for (e, n), r in zip(tried, found, strict=True) if e == entry]
            said = ", ".join(f"{n}: {r.status if r.score is None else format(r.score, '.4g')}" for n, r in mine)
            best = max((sign * r.score, -n) for n, r in mine if r.score is not None)
            lines.append(f"| {name} | {mine[0][1].method} | {task.facts.metric} | {said} | {-best[1]} |")
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
