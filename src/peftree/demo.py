"""`peftree demo`: the suite `demo` on real models and data; tables, a page, and what each method keeps."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from peftree.bench.run import Choice, run_suite
from peftree.bench.suite import Suite, load_suite
from peftree.errors import ConfigError
from peftree.files import atomic_write, cache_root
from peftree.machine import free_memory
from peftree.runs.record import RunRecord

GIB = 2**30
CACHE_GIB = 1.5  # archives, what is unpacked from them, and the converted models
OUT_GIB = 1.5  # the adapters, two of full fine-tuning at a time
KEPT = 48 << 20  # bytes: a larger adapter (a whole model) is not kept
NOTES = (
    "The learning rate of each method is, of a few, the one whose worst of three seeds is best on validation rows.",
    "Here full fine-tuning keeps the frozen base beside the trained copy, so that it can be switched off like any "
    "adapter; without, its peak memory would be lower by the size of the base.",
)


def main(out: Path, seeds: int) -> None:
    """Run the demo and write `records/`, `runs/`, `report.html` and `table.txt` into `out`.

    Finished runs are kept: call it again to continue after an interruption.

    Args:
        out: the folder to write; it is created if needed.
        seeds: runs of each method.

    Raises:
        ConfigError: too little memory or disk.
        AssetError: a model or data set could not be fetched.
        SystemExit: with code 130 after Ctrl-C.
    """
    console, out = Console(), out.absolute()
    suite = load_suite("demo")
    suite = suite.model_copy(update={"protocol": suite.protocol.model_copy(update={"seeds": seeds})})
    workers = min(2, os.cpu_count() or 1)
    console.print(opening(suite, workers, out), highlight=False, soft_wrap=True)
    check_machine(suite, out)
    try:
        every = Choice(tuple(suite.tasks))  # chosen by name, so that one that cannot be fetched is said before any run
        found = run_suite(suite, out, choice=every, workers=workers, console=console, keep=KEPT)
    except KeyboardInterrupt:
        console.print("\nStopped. Finished runs are kept; the same command continues.")
        raise SystemExit(130) from None
    show(suite, found, out, console)


def opening(suite: Suite, workers: int, out: Path) -> str:
    """Return what will be done, and about how long it will take."""
    entries = {name: dict(suite.entries(name)) for name in suite.tasks}
    methods = {entry.method or name for each in entries.values() for name, entry in each.items()}
    spent = sum(suite.tasks[name].seconds * e.cost for name, each in entries.items() for e in each.values())
    minutes = spent * suite.protocol.seeds / workers / 60
    lines = [
        f"{sum(map(suite.runs, suite.tasks))} runs: {len(methods)} methods, {len(suite.tasks)} tasks, seeds: "
        f"{suite.protocol.seeds}; each run is a process of its own. It takes about {math.ceil(minutes)} min.",
        f"Models and data come from package registries and are kept for next time ({cache_root()}).",
        *(f"  {n}: {suite.tasks[n].model} on {suite.tasks[n].dataset}, {len(e)} methods" for n, e in entries.items()),
        f"Results go to {out}. Ctrl-C keeps finished runs; the same command then continues.",
    ]
    return "\n".join(lines)


def check_machine(suite: Suite, out: Path) -> None:
    """Raise ConfigError if the largest run does not fit into memory, or results or models onto the disk."""
    largest = max(suite.tasks[name].memory * entry.memory for name in suite.tasks for _, entry in suite.entries(name))
    if (memory := free_memory() / GIB) < largest:
        raise ConfigError(
            f"The largest run takes {largest:.1f} GiB of memory; {memory:.1f} GiB are free.",
            "Close other programs, or run the demo on a machine with more memory.",
        )
    needed = {out: OUT_GIB}
    if not (cache_root() / "models").is_dir():
        needed[cache_root()] = CACHE_GIB
    for folder, gib in needed.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / GIB
        if free < gib:
            raise ConfigError(
                f"{folder} needs {gib:.1f} GiB of disk; {free:.1f} GiB are free.",
                "Free some, or choose other folders with --out and PEFTREE_CACHE.",
            )


def show(suite: Suite, records: Sequence[RunRecord], out: Path, console: Console) -> None:
    """Print the tables, what each method keeps, and what to do next; write tables and page into `out`."""
    from peftree import report  # after the first lines: it brings scipy

    built = report.build(records)
    tasks = [dataclasses.replace(task, notes=(*task.notes, *NOTES)) for task in built.tasks]
    built = dataclasses.replace(built, tasks=tuple(tasks))
    page = atomic_write(out / "report.html", report.page.render(built))
    text = io.StringIO()
    Console(file=text, width=200).print(report.terminal.render(built))
    atomic_write(out / "table.txt", text.getvalue())
    console.print()
    console.print(report.terminal.render(built))
    console.print("\n".join(built.headlines), highlight=False, soft_wrap=True, markup=False)
    console.print(f"[bold]The report: {page}[/] (open it in a browser)", highlight=False, soft_wrap=True)
    console.print("\n".join(next_steps(suite, records, out)), highlight=False, soft_wrap=True)


def next_steps(suite: Suite, records: Sequence[RunRecord], out: Path) -> list[str]:
    """Return commands to try next."""
    first, task = next(iter(suite.tasks.items()))
    sign = 1.0 if task.facts.higher_is_better else -1.0
    done = [(sign * r.score, r) for r in records if r.task == first and r.score is not None]
    best = max((pair for pair in done if pair[1].branch != "reference"), key=lambda pair: pair[0], default=None)
    lines = ["Next:"]
    if best is not None:
        folder = next((out / "runs").glob(f"{first}-*{best[1].method}-final-{best[1].seed}"), None)
        if folder is not None:
            lines.append(f"  peftree eval {folder}    # that adapter beside its base model, item by item")
    return [
        *lines,
        f"  peftree train model={task.model} data=YOUR.csv method=lora    # columns: text, label",
        "  peftree methods    # the tree of methods; then: peftree methods lora",
    ]
