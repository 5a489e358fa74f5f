"""The learning rates of the demo, found on validation rows: `python -m tools.demo_rates RESULTS` tries them.

Each entry of the suite `demo` is trained at some multiples of its method's default rate, three times, with seeds that
no run of the demo has. docs/demo-rates.md is written from the records in RESULTS; the suite's `times` are copied from
there by hand.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

from peftree.bench.pool import run_cells
from peftree.bench.run import PRELOAD, TRIAL_SEED, Planned, rate
from peftree.bench.sources import gather
from peftree.bench.suite import load_suite

PAGE = Path(__file__).parents[1] / "docs" / "demo-rates.md"
TIMES = {"full": (1, 2, 4), "ia3": (4, 8, 16), "mam": (1, 2, 4)}
OTHERS, SEEDS = (2, 4, 8), 3
HEAD = """# The demo's learning rates

Written by `python -m tools.demo_rates`: every entry of the suite `demo` at three multiples of its method's default,
which is made for longer training, each trained with three seeds that the demo does not use and scored on validation
rows. The suite takes the rate whose worst seed is best; no test row was looked at. The table shows the worst of three.

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
            planned._cell(e, "trial", rate(e, suite.methods[e], n), TRIAL_SEED + seed)
            for e, n in tried
            for seed in range(SEEDS)
        ]
        found = iter(run_cells(cells, out / "records", workers=2, preload=PRELOAD))
        sign = 1.0 if task.facts.higher_is_better else -1.0
        for entry, _ in suite.entries(name):
            worst: dict[int, float] = {}
            for times in (n for e, n in tried if e == entry):
                scores = [r.score for r in itertools.islice(found, SEEDS)]
                worst[times] = min(-math.inf if score is None else sign * score for score in scores)
            said = ", ".join(f"{n}: {sign * score:.4g}" for n, score in worst.items())
            best = max(worst, key=lambda times: worst[times])  # of equals the lowest
            method = suite.methods[entry].method
            lines.append(f"| {name} | {method} | {task.facts.metric} | {said} | {best} |")
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
