"""Runs the tests' tiny suite, for a test to kill: `python suite_runner.py ROOT OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    from bench.test_run import suite
    from peftree.bench.run import run_suite

    run_suite(suite(Path(sys.argv[1])), Path(sys.argv[2]))
