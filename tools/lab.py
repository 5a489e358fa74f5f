"""Whether each method learns: `python -m tools.lab [run [TASK ..]]` trains them all on small real tasks.

Without `run` the page docs/lab/index.md is made from the records beside it. `run` does what they lack: the head alone
at every rate, then every method at its default, those that did not learn at higher rates; what can change no verdict
comes last. It may be stopped at any moment and called again. `--methods=a,b` these alone, `--again` though they are
there. Two tasks may run side by side.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import yaml

from peftree import registry
from peftree.adapter import disabled
from peftree.bench.sources import Material, gather
from peftree.bench.suite import SuiteTask
from peftree.errors import DivergedError, MethodError, PeftreeError, SiteError
from peftree.evaluate.quality import evaluating
from peftree.settings import RunConfig
from peftree.train.run import OpenRun, complete

LAB = Path(__file__).parents[1] / "docs" / "lab"
TASKS = {n: SuiteTask(**t) for n, t in yaml.safe_load((LAB / "tasks.yaml").read_text("utf-8")).items()}
FACTORS = (1, 3, 10)
SEEDS = (0, 1, 2)
HEAD, FULL = "head_only", "full"
STILL = 0.01  # of the frozen model's loss: a method that never changes it by more hardly moves
Record = dict[str, Any]


class Cell(NamedTuple):
    """One run: a method at its default rate times a factor, with a seed."""

    method: str
    factor: int
    seed: int


def cells() -> list[Cell]:
    """Return every run of a task: what the others have to beat first, then rate by rate."""
    rates = [(factor, seed) for factor in FACTORS for seed in SEEDS]
    first = [*(Cell(HEAD, *rate) for rate in rates), Cell(FULL, *rates[0])]
    every = [Cell(name, *rate) for rate in rates for name in registry.methods()]
    return first + [c for c in every if c not in first]


def records(task: str) -> list[Record]:
    """Return what was found on a task as it was last run; of a run that was done again, the last."""
    path = LAB / f"{task}.jsonl"
    every = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
    found = {cell(r): r for r in every if r["state"] == every[-1]["state"]}
    return [found[c] for c in sorted(found)]


def cell(record: Record) -> Cell:
    """Return which run a record is of."""
    return Cell(record["method"], record["factor"], record["seed"])


def run(name: str, only: set[str], again: bool) -> None:
    """Do the runs of a task that have no record, and append one for each."""
    task = TASKS[name]
    material = gather(task, quiet=True)
    state = hashlib.sha256(json.dumps([task.settings, material.sha256, material.weights]).encode()).hexdigest()[:12]
    asked = only or set(registry.methods())
    known = [r for r in records(name) if r["state"] == state and not (again and r["method"] in asked)]
    done, unfit = {cell(r) for r in known}, {r["method"] for r in known if r["status"] == "inapplicable"}
    missing = [c for c in cells() if c.method in asked and c not in done]
    later: list[Cell] = []  # what changes no verdict
    for wanted in chain(missing, later):
        if wanted.method in unfit:
            continue
        if wanted not in later and wanted.method != HEAD and not needed(wanted, known):
            later.append(wanted)
            continue
        found = {**wanted._asdict(), "state": state, **trained(task, material, wanted)}
        with (LAB / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        known.append(found)
        unfit |= {wanted.method} if found["status"] == "inapplicable" else set()
        said = f"{found['loss']:.4f}" if "loss" in found else found["status"]
        print(f"{name} {' '.join(map(str, wanted))}: {said} ({found['seconds']} s)", flush=True)


def needed(wanted: Cell, known: list[Record]) -> bool:
    """Return whether a run may change a verdict: no lower rate is enough, and no seed failed at this one."""
    found, bar = {row.method: row for row in rows(known)}, target(known)
    if wanted.method not in found or bar is None:
        return True
    said, losses = verdict(found[wanted.method], bar), found[wanted.method].losses
    return said == "open" and max(losses.get(wanted.factor, [-math.inf])) < bar


def trained(task: SuiteTask, material: Material, wanted: Cell) -> Record:
    """Train one method in a folder of its own, and return its score, or why there is none."""
    start, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="lab"))
    lr = registry.get(wanted.method).tags.lr * wanted.factor
    data = {split: material.data.split(split) for split in ("train", "valid", "test")}
    own = {"model": material.model, "task": task.task, "data": data, "method": {"name": wanted.method}, "lr": lr}
    own |= {"output": str(folder / "run"), "seed": wanted.seed, "threads": 1, "quiet": True}
    try:
        config = RunConfig.model_validate({**task.settings, **own, "base_score": False, "measure_memory": False})
        result, opened = complete(config)
        found: Record = {"status": "ok", "loss": heldout(opened), "trained": result.trainable_parameters}
        found |= {result.metric: result.score}
        if wanted.method in (HEAD, FULL):
            with disabled(opened.task.model):
                found["frozen"] = heldout(opened)
    except (MethodError, SiteError) as error:
        found = {"status": "inapplicable", "error": str(error)}
    except DivergedError as error:
        found = {"status": "diverged", "error": str(error)}
    except PeftreeError as error:
        found = {"status": "failed", "error": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"lr": lr, **found, "seconds": round(time.monotonic() - start, 1)}


def heldout(opened: OpenRun) -> float:
    """Return the model's mean loss on the test rows."""
    task, rows, total = opened.task, opened.data.test, 0.0
    with evaluating(task.model):
        for batch in task.batches(task.items(rows), 32):
            total += float(task.model(**batch).loss) * len(batch["labels"])
    return total / len(rows)


class Row(NamedTuple):
    """What is known of a method on a task: losses by factor, and why a run has none."""

    method: str
    lr: float
    losses: dict[int, list[float]]
    error: str


def rows(found: list[Record]) -> list[Row]:
    """Return one row a method, in the order of the registry."""
    grouped: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        grouped[record["method"]].append(record)
    made = []
    for name in (n for n in registry.methods() if n in grouped):
        mine, losses = grouped[name], defaultdict[int, list[float]](list)
        for record in mine:
            if record["status"] in ("ok", "diverged"):
                losses[record["factor"]].append(record.get("loss", math.inf))
        error = next((r["error"] for r in mine if r["status"] != "ok"), "")
        made.append(Row(name, registry.get(name).tags.lr, losses, error))
    return made


def verdict(row: Row, bar: float) -> str:
    """Return at which rate every seed is below `bar`: `default`, `3 x`, `10 x` or `none`; `open`: runs are missing."""
    for factor in FACTORS:
        losses = row.losses.get(factor, [])
        if losses and max(losses) >= bar:
            continue  # one seed that does not learn is enough
        return "open" if len(losses) < len(SEEDS) else "default" if factor == 1 else f"{factor} x"
    return "none"


def reason(row: Row, bar: float, frozen: float) -> str:
    """Return what the losses of a method that learns at no rate have in common, as a sentence."""
    below = {f: [loss < bar for loss in losses] for f, losses in row.losses.items()}
    factor = max(below, key=lambda f: sum(below[f]))
    losses = row.losses[factor]
    at = "the default rate" if factor == 1 else f"{factor} x"
    if count := sum(below[factor]):
        span = f"{min(losses):.3f} to {max(losses):.3f}"
        return f"at {at}, {count} of {len(losses)} seeds are below ({span}); it depends on start and order."
    every = [loss for losses in row.losses.values() for loss in losses]
    far = max(abs(loss - frozen) for loss in every)
    if far <= STILL * frozen:
        return f"it hardly moves in so few steps: no loss is further than {far:.4f} from the frozen model's."
    means = [mean(row.losses[factor]) for factor in sorted(row.losses)]
    span = f"from {means[0]:.3f} to {means[-1]:.3f}"
    if len(means) > 1 and means == sorted(means, reverse=True) and means[-1] < frozen:
        return f"its loss falls with the rate, {span}: the default is low for so few steps."
    if len(means) > 1 and means == sorted(means):
        return f"its loss rises with the rate, {span}: the default is high for so few steps."
    return f"its loss is above at every rate ({min(every):.3f} to {max(every):.3f})."


def target(found: list[Record]) -> float | None:
    """Return the loss to be below: that of the frozen model and of the head at its best rate; None: not known yet."""
    frozen = [r["frozen"] for r in found if "frozen" in r][:1]
    head = next((row.losses for row in rows(found) if row.method == HEAD), {})
    whole = frozen and (not head or sum(map(len, head.values())) == len(FACTORS) * len(SEEDS))
    return min([*frozen, *map(mean, head.values())]) if whole else None


def verdicts(found: list[Record]) -> dict[str, str]:
    """Return the verdict on every method that could be trained on a task; the head is not one of them."""
    bar = target(found)
    tried = [row for row in rows(found) if row.losses and row.method != HEAD]
    return {row.method: "open" if bar is None else verdict(row, bar) for row in tried}


def section(name: str, notes: dict[str, dict[str, str]]) -> list[str]:
    """Return the lines of a task."""
    found, task = records(name), TASKS[name]
    frozen = next((r["frozen"] for r in found if "frozen" in r), None)
    if frozen is None:
        return [f"## {name}", "", "Not run yet.", ""]
    by_name = {row.method: row for row in rows(found)}
    head = by_name.pop(HEAD).losses if HEAD in by_name else {}
    alone = f", the head alone {min(map(mean, head.values())):.4f}" if head else "; there is no new head to train alone"
    tried, won = [row for row in by_name.values() if row.losses], verdicts(found)
    names = ("default", "3 x", "10 x", "none", "open")
    default, three, ten, none, left = (sum(v == w for v in won.values()) for w in names)
    lines = [
        f"## {name}", "",
        f"{task.dataset[0].upper()}{task.dataset[1:]}, {task.model}, {task.settings['steps']} steps of "
        f"{task.settings['batch_size']} rows. To beat: the frozen model {frozen:.4f}{alone}.", "",
        f"Of {len(tried)} methods {default} learn at their default rate, {three} more at three times that, {ten} more "
        f"at ten times, {none} at none of them{f'; of {left} runs are missing' if left else ''}.", "",
        "| method | default rate | at it | 3 x | 10 x | learns at |", "|---|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    for row in tried:
        shown = " | ".join(_shown(row.losses.get(factor, [])) for factor in FACTORS)
        lines.append(f"| {row.method} | {row.lr:g} | {shown} | {won[row.method]} |")
    said = notes.get("all", {}) | notes.get(name, {})
    late = [row.method for row in tried if won[row.method] == "none"]
    bar = target(found)
    why = {m: said.get(m) or reason(by_name[m], bar, frozen) for m in late if bar is not None}
    lines += ["", *(f"* {method}: {why[method]}" for method in late), ""]
    if unfit := [row for row in by_name.values() if not row.losses]:
        lines += ["Does not apply here, or did not end:", "", *(f"* {r.method}: {r.error}" for r in unfit), ""]
    return lines


def _shown(losses: list[float]) -> str:
    spread = f" ({min(losses):.3f}-{max(losses):.3f})" if len(losses) > 1 else ""
    return f"{mean(losses):.4f}{spread}" if losses else ""


HEAD_LINES = """# Does each method learn?

Written by `make lab-page` from the records beside it, which `python -m tools.lab run` makes: every method with its
default fields on one small real task a modality ([tasks.yaml](tasks.yaml)), at its default learning rate, three and ten
times that, with up to three seeds (a cell with one number was run once, others show the mean and the range). The number
is the mean cross-entropy on test rows: lower is better. A method **learns** at a rate where with every seed it is below
the frozen model and below the mean of the head alone at its best of the three rates. One seed that is not settles a
rate, and higher rates are tried only then. Until these runs are made, the head's among them, it is *open*.

A run is tens of steps. Adam moves an entry by about the learning rate a step, so that a default that is meant for
thousands of steps does little here: a method that learns at three or ten times its default is slow, not wrong. Ranks
among methods are not what this page is for; [the study](../study.md) is.
"""


def page() -> None:
    """Write the page."""
    notes = yaml.safe_load((LAB / "notes.yaml").read_text("utf-8")) or {}
    lines = [HEAD_LINES]
    for name in TASKS:
        lines += section(name, notes)
    (LAB / "index.md").write_text("\n".join(lines).rstrip() + "\n", "utf-8")


if __name__ == "__main__":
    words = [w for w in sys.argv[1:] if not w.startswith("--")]
    flags = dict(w[2:].partition("=")[::2] for w in sys.argv[1:] if w.startswith("--"))
    if words[:1] == ["run"]:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        for each in words[1:] or TASKS:
            run(each, set(filter(None, flags.get("methods", "").split(","))), "again" in flags)
    else:
        page()
