"""A runner for the tests to kill: `python runner.py FOLDER COUNT SLEEP`; and the cells it does."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from peftree.bench.pool import Cell, run_cells


def cell(folder: Path, seed: int, *, sleep: float = 0.0, behaviour: str = "work", memory: float = 0.0) -> Cell:
    """Return a cell of its own key for each `seed`."""
    facts = {
        "suite": "test", "task": "task", "dataset": "data", "model": "model", "method": "lora",
        "modality": "language", "kind": "understanding", "branch": "reparameterized",
        "fields": {"r": 8}, "budget": {"steps": 2}, "learning_rate": 1e-3, "seed": seed,
        "metric": "accuracy",
    }  # fmt: skip
    job = {"facts": facts, "records": str(folder), "sleep": sleep, "behaviour": behaviour}
    return Cell(facts, "bench.child:work", job, memory=memory)


def main() -> None:
    """Do COUNT cells that sleep SLEEP seconds each, two at a time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background starts with it ignored
    sys.path.append(str(Path(__file__).parents[1]))  # where the cells' function is found
    folder, count, sleep = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    run_cells([cell(folder, seed, sleep=sleep) for seed in range(count)], folder, workers=2)


if __name__ == "__main__":
    main()
