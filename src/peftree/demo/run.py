"""`peftree demo`: real models, real data, methods of every branch beside full fine-tuning; a table and a page."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from peftree.assets.data import write_demo_data
from peftree.assets.fetch import cache_root
from peftree.assets.models import model_folder
from peftree.bench.pool import finished, run_cells
from peftree.bench.record import RunRecord
from peftree.demo.plan import Places, Plan, cells, read_plan
from peftree.errors import ConfigError
from peftree.files import atomic_write
from peftree.machine import free_memory

GIB = 2**30
CACHE_GIB = 1.5  # archives, what is unpacked from them, and the converted models
OUT_GIB = 1.5  # the adapters, two of full fine-tuning at a time
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
# What every run needs; imported once, before the runs are forked.
PRELOAD = (
    "peftree.demo.cell",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.dinov2.modeling_dinov2",
)


def main(out: Path, seeds: int, quick: bool) -> None:
    """Run the demo and write `records/`, `report.html` and `table.txt` into `out`.

    Runs that are done already are kept: called again after an interruption it goes on.

    Args:
        out: is made.
        seeds: runs of each method; one if `quick`.
        quick: fewer methods, for a first look.

    Raises:
        ConfigError: too little memory or disk.
        AssetError: a model or data set could not be fetched.
        SystemExit: with code 130 after Ctrl-C.
    """
    console = Console()
    plan = read_plan(quick=quick)
    chosen = range(plan.seeds if quick else seeds)
    out = out.absolute()
    workers = min(2, os.cpu_count() or 1)
    console.print(opening(plan, len(chosen), out), highlight=False, soft_wrap=True)
    memory = check_machine(plan, out)
    places = {name: _prepare(plan, name, out) for name in plan.tasks}
    jobs = cells(plan, places, out, chosen)
    records = out / "records"
    try:
        found = run_cells(
            jobs, records, workers=workers, memory=memory, preload=PRELOAD,
            console=console, describe=line,
        )  # fmt: skip
    except KeyboardInterrupt:
        done = sum(finished(job, records) is not None for job in jobs)
        console.print(f"\nStopped. {done} of {len(jobs)} runs are kept; the same command goes on.")
        raise SystemExit(INTERRUPTED) from None
    show(plan, found, out, console)


def opening(plan: Plan, seeds: int, out: Path) -> str:
    """Return what will be done, and how long it took elsewhere."""
    runs = sum(len(task.methods) for task in plan.tasks.values()) * seeds
    methods = {name for task in plan.tasks.values() for name in task.methods}
    lines = [
        f"{runs} runs: {len(methods)} methods, {len(plan.tasks)} tasks, seeds: {seeds}; each run is a "
        f"process of its own. It took {plan.minutes:g} minutes on {plan.machine}.",
        f"Models and data come from package registries and are kept for the next time ({cache_root()}).",
        *(
            f"  {name}: {task.model} on {task.dataset}, {len(task.methods)} methods"
            for name, task in plan.tasks.items()
        ),
        f"Results go to {out}. Ctrl-C keeps what is done; the same command then goes on.",
    ]
    return "\n".join(lines)


def check_machine(plan: Plan, out: Path) -> float:
    """Return the bytes of memory that are free.

    Raises:
        ConfigError: the largest run does not fit into memory, or results or models onto the disk.
    """
    entries = [(task, e) for task in plan.tasks.values() for e in task.methods.values()]
    largest = max(entry.memory or task.memory for task, entry in entries) * GIB
    memory = free_memory()
    if memory < largest:
        raise ConfigError(
            f"The largest run takes {largest / GIB:.1f} GiB of memory; {memory / GIB:.1f} GiB are free.",
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
    return memory


def _prepare(plan: Plan, name: str, out: Path) -> Places:
    task = plan.tasks[name]
    data = write_demo_data(out / "data" / name, name, task.sizes)
    return Places(model_folder(task.model), data)


def line(record: RunRecord) -> str:
    """Return one finished run as a line."""
    from peftree.report.text import clean  # after the first lines: it brings scipy

    start = f"{record.task:20}  {record.method:14} seed {record.seed}"
    if record.status == "failed" or record.score is None:
        said = record.error.strip().splitlines() or [""]
        which = -1 if said[0].startswith("Traceback") else 0
        return f"{start}  failed: {clean(said[which], limit=200)}"
    took = (record.setup_seconds or 0) + (record.train_seconds or 0) + (record.eval_seconds or 0)
    peak = (record.peak_rss_bytes or 0) / GIB
    return f"{start}  {record.metric} {record.score:6.4g}  {took:4.0f} s  {peak:.2f} GiB"


def show(plan: Plan, records: Sequence[RunRecord], out: Path, console: Console) -> None:
    """Print the tables and what to do next; write them, and the page, into `out`."""
    from peftree import report

    built = report.build(records)
    tasks = [dataclasses.replace(t, notes=(*t.notes, *notes(plan, t.name))) for t in built.tasks]
    built = dataclasses.replace(built, tasks=tuple(tasks))
    page = atomic_write(out / "report.html", report.html.render(built))
    text = io.StringIO()
    Console(file=text, width=200).print(report.terminal.render(built))
    atomic_write(out / "table.txt", text.getvalue())
    console.print()
    console.print(report.terminal.render(built))
    console.print(f"[bold]The report: {page}[/] (open it in a browser)", highlight=False)
    console.print("\n".join(next_steps(plan, records, out)), highlight=False, soft_wrap=True)


def notes(plan: Plan, name: str) -> list[str]:
    """Return what a careful reader must know about a task of the demo."""
    task = plan.tasks[name]
    rows = task.settings["steps"] * task.settings["batch_size"]
    raised = sum(entry.times > 1 for entry in task.methods.values())
    return [
        f"A run sees {rows:,} training rows in {task.settings['steps']} steps: enough to show that a "
        "method learns, too few to rank methods.",
        f"{raised} of {len(task.methods)} methods run at 4 or 16 times their default learning rate, "
        "which is made for longer training: each at the best of 1, 4 and 16 times, tried once on "
        "validation rows.",
        "Here full fine-tuning keeps the frozen base beside the trained copy, so that it can be "
        "switched off like any adapter; without, its peak memory would be lower by the size of the base.",
    ]


def next_steps(plan: Plan, records: Sequence[RunRecord], out: Path) -> list[str]:
    """Return three commands that go on from here."""
    task = next(iter(plan.tasks))
    done = [r for r in records if r.task == task and r.score is not None and r.branch != "reference"]
    best = max(done, key=lambda r: r.score or 0.0, default=None)
    lines = ["Next:"]
    if best is not None:
        folder = out / "runs" / f"{task}-{best.method}-seed{best.seed}"
        lines.append(f"  peftree eval {folder}    # that adapter beside its base model, item by item")
    model = cache_root() / "models" / plan.tasks[task].model
    return [
        *lines,
        f"  peftree train model={model} data=YOUR.csv method=lora    # columns: text, label",
        "  peftree methods    # the tree of methods; then: peftree methods lora",
    ]
