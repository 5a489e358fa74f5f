"""Write docs/study.md from the packed study: `python tools/study.py`.

Every number comes from docs/study/small.jsonl.gz and the suite `small`; intervals, relative scores and paired tests are
the report's. Methods are compared once all their final seeds are there. The words are in study.md.j2.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2

from peftree import registry, report
from peftree.bench.command import read_packed
from peftree.bench.record import RunRecord, in_order
from peftree.bench.run import states
from peftree.bench.samples import FULL, HEAD_ONLY, comparisons, labelled
from peftree.bench.suite import Suite, load_suite
from peftree.bench.versus import ALPHA
from peftree.files import atomic_write
from peftree.report import compare, text
from peftree.report.data import Row, Task
from peftree.report.markup import escape_markdown
from peftree.train.config import RunConfig

HERE = Path(__file__).parents[1]
PACK, PAGE = HERE / "docs" / "study" / "small.jsonl.gz", HERE / "docs" / "study.md"
LORA, NO_GAIN = "lora", "no gain to retain"
KEPT = {"yes": "shown", "not shown": "not shown", "no": "not retained", "": "reference"}
FLOAT32, LIMITS = 4, (1.0, 0.5)  # bytes; shares of full's memory that are counted
HEADS = (
    *("method", "score", "relative score", "≥ 90 % retained", "minus `full`", "minus `lora`", "trainable"),
    *("allocator peak / full", "peak RSS / full", "peak RSS / full, copy taken off"),
    *("gradients + optimizer / full", "on disk"),
)
MEMORY = [f"{what} {limit}" for what in ("allocator peak", "peak RSS") for limit in ("below full's", "below half")]

Identity = tuple[str, str, str]


def identity(task: str, method: str, fields: object) -> Identity:
    """Return what tells the cells of the suite apart."""
    return task, method, json.dumps(fields, sort_keys=True)


def complete(records: Iterable[RunRecord], suite: Suite) -> dict[tuple[str, str], list[RunRecord]]:
    """Return the final runs of each cell (task, entry) whose final seeds are all settled."""
    out, wanted = dict[tuple[str, str], list[RunRecord]](), set(range(suite.protocol.seeds))
    groups: dict[Identity, list[RunRecord]] = {}
    for r in records:
        if r.suite == suite.suite and r.phase == "final" and r.settled:
            groups.setdefault(identity(r.task, r.method, r.fields), []).append(r)
    for task in suite.tasks:
        for entry, chosen in suite.entries(task):
            method = registry.make(chosen.method or entry, chosen.fields)
            runs = groups.get(identity(task, method.name, registry.spec(method)["fields"]), [])
            if wanted <= {r.seed for r in runs}:
                out[task, entry] = runs
    return out


def table(heads: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a Markdown table; the columns after the first `words` are set to the right."""
    rule = ["---" if number < words else "--:" for number in range(len(heads))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))


def ticked(names: Iterable[str]) -> str:
    """Return names as code, or a dash."""
    return " ".join(f"`{name}`" for name in names) or text.NONE


def status(records: Sequence[RunRecord], suite: Suite, cells: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Return the table of what is there and its sums."""
    found, cells = states(suite, records), set(cells)
    lines = []
    for task in suite.tasks:
        mine = [s for s in found if s.task == task]
        finished = [s.method for s in mine if (task, s.method) in cells]
        begun = [s.method for s in mine if s.trials + s.finals and s.method not in finished]
        runs = sum(s.trials + s.finals for s in mine)
        planned = runs + sum(s.missing for s in mine)
        lines.append((f"`{task}`", f"{len(finished)} / {len(mine)}", f"{runs} / {planned}", ticked(begun)))
    missing = sum(s.missing for s in found)
    heads = ("task", "methods finished / planned", "runs done / planned", "begun, not finished")
    return {
        "status": table(heads, lines), "cells": len(cells), "planned": len(found), "missing": missing,
        "runs": missing + sum(s.trials + s.finals for s in found),
    }  # fmt: skip


def gap(task: Task, row: Row | None) -> str:
    """Return a paired difference: its interval, what it shows together with Holm's p, and that p."""
    if row is None or row.difference is None:
        return text.NONE
    value = text.score(row.difference.value, task.decimals, signed=True)
    shown = row.better is not None and row.p_holm is not None and row.p_holm < ALPHA
    word = ("better" if row.better else "worse") if shown else "no difference shown"
    p = "" if row.p_holm is None else f" (p {row.p_holm:.2g})"
    return f"{value} {text.interval(row.difference, task.decimals, signed=True)}, {word}{p}"


def over(one: float | None, other: float | None) -> float | None:
    """Return a share, None where a side is not known."""
    return one / other if one is not None and other else None


def shares(row: Row, full: Row) -> tuple[float | None, ...]:
    """Return over full's: allocator peak, peak RSS, that without full's frozen copy, gradients and optimizer."""
    copy, peak = FLOAT32 * (full.trainable or 0), full.costs.peak
    lean = None if peak is None else peak - copy
    held = [
        None if g is None or o is None else g + o
        for g, o in ((r.costs.gradients, r.costs.optimizer) for r in (row, full))
    ]
    own = lean if row is full else row.costs.peak
    pairs = ((row.costs.allocator, full.costs.allocator), (row.costs.peak, peak), (own, lean), (held[0], held[1]))
    return tuple(over(one, other) for one, other in pairs)


def kept(task: Task, row: Row) -> str:
    """Say whether 90 % is retained; where the head alone is shown to be better than full, there is nothing to."""
    head = next((one for one in task.scored if one.method == HEAD_ONLY), None)
    lost = head is not None and bool(head.better)
    return NO_GAIN if row.retained and lost else KEPT[row.retained]


def line(task: Task, row: Row, full: Row, rival: Row | None, verdict: str) -> tuple[str, ...]:
    """Return a method's cells."""
    part = None if verdict in (NO_GAIN, KEPT[""]) else row.relative
    relative = text.NONE
    if part is not None:
        value, low, high = (text.score(100 * each, 0) for each in (part.value, part.low, part.high))
        relative = f"{value} % [{low}, {high}]" if part.known else f"{value} %"
    score = text.score(row.score.value if row.score else None, task.decimals)
    return (
        f"`{row.label}`", f"{score} {text.interval(row.score, task.decimals)}", relative, verdict, gap(task, row),
        gap(task, rival), text.count(row.trainable), *map(text.percent, shares(row, full)), text.size(row.costs.disk),
    )  # fmt: skip


def result(task: Task, done: Sequence[RunRecord]) -> tuple[str, Counter[str]]:
    """Return the section of a task and the counts of its verdicts, references left out."""
    full, groups = task.row(task.full), labelled(done)
    assert full is not None
    fields = registry.spec(registry.make(LORA, {}))["fields"]
    lora = next((name for name, runs in groups.items() if (runs[0].method, runs[0].fields) == (LORA, fields)), None)
    rivals = {row.label: row for row in compare.rows(groups, lora) if row.label != lora} if lora else {}
    lines, counts = [], Counter[str]()
    for row in task.scored:
        verdict = kept(task, row)
        lines.append(line(task, row, full, rivals.get(row.label), verdict))
        if row.branch == "reference":
            continue
        allocator, _, rss, _ = shares(row, full)
        low = [share is not None and share < limit for share in (allocator, rss) for limit in LIMITS]
        counts.update(["methods", verdict, *(name for name, yes in zip(MEMORY, low, strict=True) if yes)])
        if verdict == KEPT["yes"]:
            counts.update(f"{name}, kept" for name, yes in zip(MEMORY, low, strict=True) if yes)
    sense = "higher" if task.higher_is_better else "lower"
    about = (
        f"{escape_markdown(task.metric)}, {sense} is better; {text.plural(full.seeds, 'seed')}, "
        f"{text.plural(full.items, 'test item')}. The baseline of relative scores is {task.baseline or 'missing'}."
    ).replace(HEAD_ONLY, f"`{HEAD_ONLY}`")
    if counts[NO_GAIN]:
        about += " `full` is shown to be worse than that here, with no gain to retain: as run, it is a weak reference."
    parts = [f"### {escape_markdown(task.title)}", about, table(HEADS, lines), *map(escape_markdown, task.notes)]
    return "\n\n".join(parts), counts


def results(cells: dict[tuple[str, str], list[RunRecord]]) -> dict[str, object]:
    """Return the tables of all tasks where full and head_only are finished, and the verdicts as counts."""
    done = [
        r for (task, _), runs in cells.items() if (task, FULL) in cells and (task, HEAD_ONLY) in cells for r in runs
    ]
    if not done:
        return {"results": "No task has finished runs of both `full` and `head_only` yet.", "short": "Nothing yet."}
    parts, counted = [], {}
    for task, runs in zip(report.build(done).tasks, comparisons(in_order(done)).values(), strict=True):
        if task.full is not None:
            part, counted[f"`{task.name}`"] = result(task, runs)
            parts.append(part)
    counted["all"] = sum(counted.values(), Counter[str]())
    names = ("methods", *list(KEPT.values())[:3], NO_GAIN)
    lines = [
        (name, *(str(c[key]) for key in names), *(f"{c[key]} ({c[f'{key}, kept']})" for key in MEMORY))
        for name, c in counted.items()
    ]
    said = (
        "Finished methods other than `full` and `head_only`: for how many ≥ 90 % retained is shown, and how many "
        "need less memory than `full` (in brackets: those of them for which it is shown too). Peak RSS is held against "
        "`full` with its frozen copy taken off, the stricter reading."
    )
    heads = ("task", "methods", "≥ 90 % retained: shown", *names[2:], *MEMORY)
    return {"results": "\n\n".join(parts), "short": f"{said}\n\n{table(heads, lines)}"}


def span(values: Iterable[int | None]) -> str:
    """Return the range of what is known."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value:,}" for value in (known if len(known) < 3 else known[:: len(known) - 1])) or text.NONE


def at_the_edge(records: Sequence[RunRecord], final: Sequence[RunRecord]) -> tuple[int, int]:
    """Return in how many cells the chosen learning rate is the lowest or highest tried, and of how many."""
    tried: dict[Identity, set[float]] = {}
    for r in records:
        if r.phase == "trial" and r.learning_rate is not None:
            tried.setdefault(identity(r.task, r.method, r.fields), set()).add(r.learning_rate)
    chosen = {identity(r.task, r.method, r.fields): r.learning_rate for r in final}
    ends = [chosen[key] in (min(tried[key]), max(tried[key])) for key in chosen if key in tried]
    return sum(ends), len(ends)


def page(records: Sequence[RunRecord], suite: Suite) -> str:
    """Return the page."""
    cells = complete(records, suite)
    final = [r for runs in cells.values() for r in runs]
    settings = [RunConfig.model_validate({**t.settings, "model": "x", "data": "x"}) for t in suite.tasks.values()]
    checkpoints = any(each.gradient_checkpointing for each in settings)
    lost = Counter(r.status for r in records if r.status != "ok")
    facts = {
        **status(records, suite, cells), **results(cells), "suite": suite.suite, "alpha": f"{ALPHA:g}",
        "methods": text.plural(len(suite.methods), "method"), "tasks": text.plural(len(suite.tasks), "task"),
        "seeds": suite.protocol.seeds, "trials": text.plural(suite.protocol.trials, "trial"),
        "lost": text.join([f"{number} {word}" for word, number in sorted(lost.items())]) or "none",
        "baseline": f"{text.join(sorted({each.dtype for each in settings}))}, AdamW, "
                    f"{'gradient checkpointing on some tasks' if checkpoints else 'no gradient checkpointing'}",
        "edge": "{} of {}".format(*at_the_edge(records, final)),
        "steps": span(r.steps for r in final), "rows": span(r.n_train for r in final),
        "parameters": span(r.total_parameters for r in final),
        "machines": text.join(sorted({escape_markdown(str(r.environment.get("machine", "?"))) for r in final})),
    }  # fmt: skip
    words = Path(__file__).with_name("study.md.j2").read_text("utf-8")
    return str(jinja2.Template(words, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(facts))


if __name__ == "__main__":
    atomic_write(PAGE, page(read_packed(PACK), load_suite("small")))
