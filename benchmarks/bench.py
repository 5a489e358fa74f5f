"""Measures sections of docs/bench.md into docs/bench.json: `make bench [SECTION=name]`, `make bench-confirm`.

    python benchmarks/bench.py [SECTION ..] [--rounds N] [--all] [--confirm]

Without names: the sections that the code has left behind, or that were measured with fewer rounds than stated; `--all`
all of them. Each is a process of its own and is written once it is done, so a run may be stopped and called again.
`--rounds`: at most so many. `--small` tries sections with one layer and few tokens, in this process: the page says that
this is not a measurement, and `make bench` replaces it. `--confirm` measures a few rows again if the code has left a
section behind, and if their bytes and ratios are those of the page, notes that and the hash of the code.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tools import bench_page as page
from tools import hot_code

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def measured(section: page.Section, rounds: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a section in a process of its own and return its record."""
    script, *part = section.command.split()
    code = hot_code.digest(section.code)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [*part, "--rounds", str(rounds), "--seconds", str(section.seconds), "--json", str(out)]
        words += ["--only", *only] if only else []
        begin = time.monotonic()
        run = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script), *words]
        subprocess.run(run, check=True, env=os.environ | ONE_THREAD)
        found = json.loads(out.read_text("utf-8"))
    facts = {"date": datetime.date.today().isoformat(), "rounds": rounds, "seconds": round(time.monotonic() - begin)}
    return {**facts, "code": code, **found}


def tried(section: page.Section) -> dict[str, Any]:
    """Run a section with the smallest sizes in this process and return its record."""
    os.environ.update(ONE_THREAD | {"BENCH_SMALL": "1"})
    script, *part = section.command.split()
    step, module = (importlib.import_module(name) for name in ("step", script.removesuffix(".py")))
    own = {"plain": False, "layers": 1, "dtype": "float32"}
    asked = argparse.Namespace(part=" ".join(part), rounds=1, seconds=1.0, only=[], **own)
    begin = time.monotonic()
    rows = list(module.measured(asked))
    facts = {"date": datetime.date.today().isoformat(), "rounds": 1, "seconds": round(time.monotonic() - begin)}
    return {**facts, "small": True, "code": hot_code.digest(section.code), "machine": step.machine(), "rows": rows}


def store(data: dict[str, page.Record]) -> None:
    """Write all records."""
    page.atomic_write(page.DATA, page.dump(data))


def confirm(data: dict[str, page.Record]) -> int:
    """Measure rows of the sections that the code has left behind; note the new hash, or say what is against it."""
    sections = page.stated()[0]
    old = page.outdated(data)
    if missing := [name for name in sections if name not in data or "small" in data[name]]:
        print(f"Not measured yet: {', '.join(missing)}. Run `make bench`.")
        return 1
    against, count = [], 0
    for name in (n for n in sections if sections[n].confirm) if old else ():
        section = sections[name]
        again = measured(section._replace(seconds=30), 5, section.confirm)
        against += [f"{name}: {fault}" for fault in page.faults(section, data[name], again)]
        count += len(again["rows"])
    if against:
        print("Not confirmed:", *against, "Run `make bench`.", sep="\n")
        return 1
    for name in old:
        data[name]["code"] = hot_code.digest(sections[name].code)
        data[name]["confirmed"] = f"Confirmed on {datetime.date.today().isoformat()} by {count} rows of the page"
    store(data)
    print(f"{len(old)} sections confirmed by {count} rows." if old else "Every section is of this code.")
    return 0


def main() -> int:
    """Measure or confirm."""
    sections = page.stated()[0]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *sections])
    parser.add_argument("--rounds", type=int, default=sys.maxsize)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--confirm", action="store_true")
    asked = parser.parse_args()
    data = page.load()
    if asked.confirm:
        return confirm(data)
    old = page.outdated(data)
    for name, section in sections.items():
        rounds = min(asked.rounds, section.rounds)
        few = name not in data or data[name]["rounds"] < rounds or "small" in data[name]
        if name in asked.sections or (not asked.sections and (asked.all or name in old or few)):
            print(f"{name}: {section.title}", flush=True)
            found = tried(section) if asked.small else measured(section, rounds)
            data = page.load()  # another section may have been measured meanwhile
            store({**data, name: found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
