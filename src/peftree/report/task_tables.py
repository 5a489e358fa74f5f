"""The tables below a task's results: costs, tuning, robustness, calibration, retention and the rest.

Each table is there only if the records hold its figures.
"""

from __future__ import annotations

from peftree import text
from peftree.report import probed
from peftree.report.data import Row, Task, Tuning
from peftree.report.tables import NAME, row_table
from peftree.report.tuning import decades
from peftree.table import NOTHING, Cell, Head, Line, Table, number


def tables(task: Task) -> list[Table]:
    """Return the further tables of `task`, in reading order."""
    found = [
        *(make(task) for make in (tuned, memory, time)),
        *probed.probed(task),
        *(make(task) for make in (probed.shift, probed.sequence, probed.metrics)),
    ]
    return [table for table in found if table is not None]


# Fields of a run's costs, as columns.
MEMORY = {
    "rss_after_load_bytes": Head(
        "After load", "Resident memory once the model is loaded: weights, interpreter and libraries."
    ),
    "gradient_bytes": Head("Gradients", "Bytes of the gradients."),
    "optimizer_bytes": Head("Optimizer", "Bytes of the optimizer's state."),
    "saved_for_backward_bytes": Head("For backward", "Bytes saved for the backward pass."),
    "rest_bytes": Head(
        "Rest", "Peak minus the four before; what is not alive at the same time makes it smaller, never below 0."
    ),
    "peak_rss_bytes": Head("Peak", "Peak resident memory of the process."),
    "allocator_peak_bytes": Head("Allocator", "Peak of the allocator within a training step, above its start."),
}
TIME = {
    "setup_seconds": Head("Set-up"),
    "train_seconds": Head("Train"),
    "eval_seconds": Head("Evaluate"),
    "cpu_seconds": Head("Processor", "Processor time of the whole run."),
}


def memory(task: Task) -> Table | None:
    """What the peak consists of, if gradients or optimizer were measured."""

    def fill(row: Row) -> list[Cell] | None:
        c = row.costs
        if c.gradient_bytes is None and c.optimizer_bytes is None and c.allocator_peak_bytes is None:
            return None
        return [Cell(text.size(part), "", part) for part in (getattr(c, name) for name in MEMORY)]

    return row_table(task, "memory", "Memory, part by part", "Medians over the seeds.", [*MEMORY.values()], fill)


def time(task: Task) -> Table | None:
    """Where time goes, if more is known than the results table shows."""

    def fill(row: Row) -> list[Cell] | None:
        c = row.costs
        if c.throughput is None:
            return None
        rate = Cell(f"{text.count(c.throughput)} {c.throughput_unit}", "", c.throughput)
        return [*(Cell(text.seconds(part), "", part) for part in (getattr(c, name) for name in TIME)), rate]

    heads = [*TIME.values(), Head("Throughput", "Of training.")]
    return row_table(task, "time", "Time", "Medians over the seeds.", heads, fill)


def tuned(task: Task) -> Table | None:
    """The trials of every method."""
    if not task.tuning:
        return None
    lines = tuple(Line((Cell(one.label, "", one.label), *_tuned(task, one))) for one in task.tuning)
    heads = (
        NAME,
        Head("Trials", "Random learning rates tried, scored on validation rows."),
        Head("No score", "Trials that diverged or failed."),
        Head("Best rate"),
        Head("Best score", "On validation rows, so a little too good."),
        Head(
            "Steady range",
            "Rates around the best where every trial came within 95 % of its score, and the decades they span.",
        ),
        Head("Best of 1", "Expected score of one random trial."),
        Head("Best of half", "Expected best score of half as many trials, with its 95 % band and how long they take."),
    )
    caption = (
        f"{task.metric} on validation rows. Expected best scores by the unbiased estimator of Tang et al. (2020); "
        "diverged trials count as the worst seen."
    )
    return Table(f"{task.anchor}-tuning", "Tuning", caption, heads, lines)


def _tuned(task: Task, one: Tuning) -> list[Cell]:
    bad = [trial.status for trial in one.trials if trial.status != "ok"]
    kinds = text.join([f"{bad.count(kind)} {kind}" for kind in dict.fromkeys(bad)])
    cells = [Cell(str(len(one.trials)), "", len(one.trials)), Cell(str(len(bad)), kinds, len(bad))]
    cells += [Cell(f"{one.best.rate:.3g}", "", one.best.rate) if one.best else NOTHING]
    cells += [number(one.best.score if one.best else None, task.decimals)]
    wide = decades(one)
    span = NOTHING if wide is None else Cell(f"{one.low:.2g} to {one.high:.2g}", f"{wide:.1f} decades", wide)
    if one.expected is None:
        return [*cells, span, NOTHING, NOTHING]
    e = one.expected
    ends = f"[{text.score(e.low[-1], task.decimals)}, {text.score(e.high[-1], task.decimals)}], {e.trials[-1]} trials"
    ends += f", {text.seconds(e.seconds[-1])}" if e.seconds[-1] else ""
    return [*cells, span, number(e.value[0], task.decimals), number(e.value[-1], task.decimals, sub=ends)]
