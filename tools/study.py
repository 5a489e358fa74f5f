"""Write docs/study.md from the packed study: `python -m tools.study`.

Every number comes from docs/study/small.jsonl.gz and the suite `small`; intervals, relative scores and paired tests are
the report's. Methods are compared once all their final seeds are there. The words are in study.md.j2.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import jinja2
import yaml
from markupsafe import Markup
from tools.figure import svg_file

from peftree import registry, report, text
from peftree.bench.grouping import FULL, HEAD_ONLY, comparisons, labelled
from peftree.bench.run import completed, states
from peftree.bench.suite import Suite, load_suite
from peftree.bench.versus import ALPHA
from peftree.files import atomic_write
from peftree.report import compare, diagrams, panels, plots, svg
from peftree.report.data import Row, Task
from peftree.report.markup import escape_markdown
from peftree.report.svg import num
from peftree.report.tables import interval
from peftree.runs.read import read_packed
from peftree.runs.record import RunRecord, in_order
from peftree.settings import RunConfig

HERE = Path(__file__).parents[1]
PACK, PAGE = HERE / "docs" / "study" / "small.jsonl.gz", HERE / "docs" / "study.md"
LORA, NO_GAIN, SAME = "lora", "no gain to retain", "no difference shown"
KEPT = {"yes": "shown", "not shown": "not shown", "no": "not retained", "": "reference"}
FLOAT32, LIMITS = 4, (1.0, 0.5)  # bytes; shares of full's memory that are counted
HEADS = (
    *("method", "score", "relative score", "≥ 90 % retained", "minus `full`", "minus `lora`", "trainable"),
    *("allocator peak / full", "peak RSS / full", "peak RSS / full, copy taken off"),
    *("gradients + optimizer / full", "on disk"),
)
MEMORY = [f"{what} {limit}" for what in ("allocator peak", "peak RSS") for limit in ("below full's", "below half")]

BETTER = "better than"  # or: as good as
CLAIMS = Path(__file__).with_name("study_claims.yaml")

Identity = tuple[str, str, str]


class Claim(NamedTuple):
    """What a paper says of one method over another."""

    one: str
    says: str
    other: str
    source: str


def identity(task: str, method: str, fields: object) -> Identity:
    """Return what tells the cells of the suite apart."""
    return task, method, json.dumps(fields, sort_keys=True)


def complete(records: Iterable[RunRecord], suite: Suite) -> dict[tuple[str, str], list[RunRecord]]:
    """Return the final runs of each cell (task, entry) whose final seeds are all settled."""
    out, wanted = dict[tuple[str, str], list[RunRecord]](), set(range(suite.protocol.seeds))
    groups: dict[Identity, list[RunRecord]] = {}
    for r in records:
        if r.suite == suite.suite and r.phase == "final" and r.settled:
            groups.setdefault(identity(r.task, r.method, completed(r)), []).append(r)
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


def said(row: Row | None) -> str:
    """Say what a row's paired difference shows, its interval and Holm's p together."""
    if row is None or row.difference is None:
        return ""
    if row.better is None or row.p_holm is None or row.p_holm >= ALPHA:
        return SAME
    return "better" if row.better else "worse"


def gap(task: Task, row: Row | None) -> str:
    """Return a paired difference: its interval, what it shows, and Holm's p."""
    if row is None or row.difference is None:
        return text.NONE
    value = text.score(row.difference.value, task.decimals, signed=True)
    p = "" if row.p_holm is None else f" (p {row.p_holm:.2g})"
    return f"{value} {interval(row.difference, task.decimals, signed=True)}, {said(row)}{p}"


def over(one: float | None, other: float | None) -> float | None:
    """Return a share, None where a side is not known."""
    return one / other if one is not None and other else None


def shares(row: Row, full: Row) -> tuple[float | None, ...]:
    """Return over full's: allocator peak, peak RSS, that without full's frozen copy, gradients and optimizer."""
    copy, peak = FLOAT32 * (full.trainable or 0), full.costs.peak_rss_bytes
    lean = None if peak is None else peak - copy
    held = [
        None if g is None or o is None else g + o
        for g, o in ((r.costs.gradient_bytes, r.costs.optimizer_bytes) for r in (row, full))
    ]
    own = lean if row is full else row.costs.peak_rss_bytes
    pairs = (
        (row.costs.allocator_peak_bytes, full.costs.allocator_peak_bytes),
        (row.costs.peak_rss_bytes, peak),
        (own, lean),
        (held[0], held[1]),
    )
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
        f"`{row.label}`", f"{score} {interval(row.score, task.decimals)}", relative, verdict, gap(task, row),
        gap(task, rival), text.count(row.trainable), *map(text.percent, shares(row, full)),
        text.size(row.costs.adapter_bytes),
    )  # fmt: skip


class Found(NamedTuple):
    """What is counted of one method on one task."""

    task: str
    label: str
    branch: str
    kept: str
    against_full: str
    against_lora: str
    shares: tuple[float | None, ...]


def result(task: Task, done: Sequence[RunRecord], drawn: Iterable[str]) -> tuple[str, list[Found]]:
    """Return the section of a task, and what its rows say."""
    full, groups = task.row(task.full), labelled(done)
    assert full is not None
    rivals = {row.label: row for row in compare.rows(groups, LORA) if row.label != LORA} if LORA in groups else {}
    lines, found = [], []
    for row in task.scored:
        verdict, rival = kept(task, row), rivals.get(row.label)
        lines.append(line(task, row, full, rival, verdict))
        found.append(Found(task.name, row.label, row.branch, verdict, said(row), said(rival), shares(row, full)))
    sense = "higher" if task.higher_is_better else "lower"
    about = (
        f"{escape_markdown(task.metric)}, {sense} is better; {text.plural(full.seeds, 'seed')}, "
        f"{text.plural(full.items, 'test item')}. The baseline of relative scores is {task.baseline or 'missing'}."
    ).replace(HEAD_ONLY, f"`{HEAD_ONLY}`")
    if any(each.kept == NO_GAIN for each in found):
        about += " `full` is shown to be worse than that here, with no gain to retain: as run, it is a weak reference."
    figures = " ".join(f"![{name}](study/{name}.svg)" for name in drawn)
    notes = map(escape_markdown, task.notes)
    return "\n\n".join([f"### {escape_markdown(task.title)}", about, figures, table(HEADS, lines), *notes]), found


def low(one: Found) -> list[bool]:
    """Return which of the limits on memory a method stays below: those of MEMORY, in order."""
    allocator, _, rss, _ = one.shares
    return [share is not None and share < limit for share in (allocator, rss) for limit in LIMITS]


def short(found: Sequence[Found]) -> str:
    """Return the table of verdicts, task by task, references left out."""
    names = (KEPT["yes"], KEPT["not shown"], KEPT["no"], NO_GAIN)
    lines = []
    for task in (*dict.fromkeys(one.task for one in found), ""):
        mine = [one for one in found if one.branch != "reference" and task in ("", one.task)]
        verdicts = Counter(one.kept for one in mine)
        cells = [str(len(mine)), *(str(verdicts[name]) for name in names)]
        for number in range(len(MEMORY)):
            below = [one for one in mine if low(one)[number]]
            cells.append(f"{len(below)} ({sum(one.kept == KEPT['yes'] for one in below)})")
        lines.append((f"`{task}`" if task else "all", *cells))
    return table(("task", "methods", "≥ 90 % retained: shown", *names[1:], *MEMORY), lines)


def answers(found: Sequence[Found]) -> str:
    """Return what the runs say of the survey's headline: quality kept, memory saved, and both at once."""

    def less(share: float) -> str:
        return f"{100 * (1 - share):.{2 * (share < 0.01)}f} %"

    mine = [one for one in found if one.branch != "reference"]
    verdicts, kept = Counter(one.kept for one in mine), [one for one in mine if one.kept == KEPT["yes"]]
    ordered = Counter(one.label for one in kept).most_common()
    least = max(2, ordered[min(4, len(ordered) - 1)][1]) if ordered else 0  # the fifth's, so that ties are named alike
    often = [f"`{label}` ({count})" for label, count in ordered if count >= least]
    shown, lost, left = (verdicts[KEPT[word]] for word in ("yes", "no", "not shown"))
    out = [
        f"**Is 90 % of full fine-tuning's gain kept?** For {shown} of {len(mine)} pairs of a method and a task this is "
        f"shown, for {lost} refuted, for {left} open; for {verdicts[NO_GAIN]} full fine-tuning, as run, had no gain to "
        f"keep.{f' Shown most often for {text.join(often)}.' if often else ''}"
    ]
    for number, what in ((0, "allocator peak"), (2, "peak RSS, full's copy taken off"), (3, "gradients and optimizer")):
        known = [(share, one) for one in kept if (share := one.shares[number]) is not None]
        if known:
            share, best = min(known, key=lambda pair: pair[0])
            typical = less(statistics.median(share for share, _ in known))
            out.append(f"**Saved, where it is shown, of the {what}**: {typical} in the median, at most {less(share)} "
                       f"(`{best.label}` on `{best.task}`).")  # fmt: skip
    return "\n".join(f"* {line}" for line in out)


def middle(values: Iterable[float | None]) -> str:
    """Return the median of what is known, as a percentage."""
    known = [value for value in values if value is not None]
    return text.percent(statistics.median(known)) if known else text.NONE


def by_method(found: Sequence[Found]) -> str:
    """Return what is counted of each method over the tasks, the most often better than LoRA first."""

    def counts(mine: Sequence[Found], which: str) -> str:
        counted = Counter(getattr(one, which) for one in mine)
        return " / ".join(str(counted[word]) for word in ("better", SAME, "worse")) if any(counted) else text.NONE

    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(one.label, []).append(one)
    lines = []
    for label, mine in groups.items():
        verdicts = Counter(one.kept for one in mine)
        kept = [str(verdicts[KEPT[word]]) for word in ("yes", "not shown", "no")]
        lines.append(
            (f"`{label}`", mine[0].branch, str(len(mine)), " / ".join(kept) if verdicts[KEPT[""]] == 0 else text.NONE,
             counts(mine, "against_full"), counts(mine, "against_lora"),
             *(middle(one.shares[number] for one in mine) for number in (0, 2, 3)))
        )  # fmt: skip
    lines.sort(key=lambda each: (-int(each[2]), each[0]))
    heads = ("tasks", "≥ 90 % retained: shown / not shown / not retained", "against `full`", "against `lora`")
    costs = ("allocator peak / full", "peak RSS / full, copy taken off", "gradients + optimizer / full")
    return table(("method", "branch", *heads, *costs), lines, words=2)


def claims(done: Sequence[RunRecord]) -> str:
    """Return published claims beside what the tasks show; tests against one method on one task are one family."""
    said_of = [Claim(**each) for each in yaml.safe_load(CLAIMS.read_text("utf-8"))]
    seen: dict[Claim, dict[str, list[str]]] = {claim: {} for claim in said_of}
    for runs in comparisons(in_order(done)):
        groups = labelled(runs)
        for other in dict.fromkeys(claim.other for claim in said_of):
            mine = [claim for claim in said_of if claim.other == other and claim.one in groups and other in groups]
            chosen = {label: groups[label] for label in (other, *(claim.one for claim in mine)) if label in groups}
            rows = {row.label: row for row in compare.rows(chosen, other)} if mine else {}
            for claim in mine:
                if word := said(rows[claim.one]):  # none where the method does not apply
                    seen[claim].setdefault(word, []).append(runs[0].task)
    lines = [
        (f"`{claim.one}` {claim.says} `{claim.other}`", claim.source, str(sum(map(len, tasks.values()))),
         ticked(tasks.get("better", ())), str(len(tasks.get(SAME, ()))), ticked(tasks.get("worse", ())))
        for claim, tasks in seen.items() if tasks
    ]  # fmt: skip
    said_better = [tasks for claim, tasks in seen.items() if claim.says == BETTER]
    sums = [sum(len(tasks.get(word, ())) for tasks in said_better) for word in ("better", SAME, "worse")]
    summary = (
        f"*Better than* was claimed for {sum(map(bool, said_better))} of these pairs. Over all tasks the claimed "
        f"direction is shown {sums[0]} times, no difference {sums[1]} times, the opposite {sums[2]} times."
    )
    heads = ("claim", "paper", "tasks", "shown better on", "no difference shown on", "shown worse on")
    return f"{summary}\n\n{table(heads, lines, words=2)}"


def sheet(group: panels.Panels, columns: int = 4) -> Markup:
    """Return all panels of a group as one figure, for a page that shows files."""
    gap, head = 8.0, 20.0
    wide, high = panels.WIDTH + gap, panels.HEIGHT + gap
    body = [group.shared, f'<text class="t" x="0" y="12">{escape(group.title)}</text>']
    for index, panel in enumerate(group.panels):
        x, y = num(wide * (index % columns)), num(head + high * (index // columns))
        place = f'x="{x}" y="{y}" width="{num(panels.WIDTH)}" height="{num(panels.HEIGHT)}"'
        body.append(panel.replace("<svg", Markup(f"<svg {place}"), 1))
    rows = -(-len(group.panels) // columns)
    across = wide * min(columns, len(group.panels))
    return svg.document(across, head + high * rows, group.title, group.caption, body)


def pictures(task: Task, built: report.Report) -> dict[str, str]:
    """Return the figures of a task by name, as SVG files."""
    allocator = plots.Cost("allocator peak", lambda row: row.costs.allocator_peak_bytes, text.size)
    drawn = {
        "scores": plots.whiskers(task), "memory": plots.against(task, allocator), "kept": diagrams.retention(task)
    }  # fmt: skip
    curves = {name: panels.series(task, built, name) for name in panels.SERIES} | {"sizes": panels.capacity(task)}
    found = {name: figure.svg for name, figure in drawn.items() if figure is not None}
    found |= {name: sheet(group) for name, group in curves.items() if group is not None}
    return {f"{task.name}-{name}": svg_file(figure) for name, figure in found.items()}


def results(cells: dict[tuple[str, str], list[RunRecord]]) -> tuple[dict[str, object], dict[str, str]]:
    """Return the tables of all tasks where full and head_only are finished, and the figures."""
    done = [
        r for (task, _), runs in cells.items() if (task, FULL) in cells and (task, HEAD_ONLY) in cells for r in runs
    ]
    if not done:
        empty = dict.fromkeys(("answers", "short", "by_method", "claims"), "Nothing yet.")
        return {**empty, "results": "No task has finished runs of both `full` and `head_only` yet.", "ranks": ""}, {}
    parts, found, drawn = [], list[Found](), dict[str, str]()
    built = report.build(done)
    for task, runs in zip(built.tasks, comparisons(in_order(done)), strict=True):
        if task.full is not None:
            own = pictures(task, built)
            drawn |= own
            part, rows = result(task, runs, own)
            parts.append(part)
            found += rows
    ranks = ""
    for overview in built.overviews:
        figure = diagrams.critical_difference(overview, built)
        if figure is not None:
            drawn["ranks"] = svg_file(figure.svg)
            ranks = "\n\n".join(
                ["![Mean ranks](study/ranks.svg)", figure.caption, *map(escape_markdown, overview.notes)]
            )
    said = {
        "answers": answers(found),
        "short": short(found),
        "by_method": by_method(found),
        "claims": claims(done),
        "ranks": ranks,
    }
    return {**said, "results": "\n\n".join(parts)}, drawn


def span(values: Iterable[int | None]) -> str:
    """Return the range of what is known."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value:,}" for value in (known if len(known) < 3 else known[:: len(known) - 1])) or text.NONE


def at_the_edge(records: Sequence[RunRecord], final: Sequence[RunRecord]) -> tuple[int, int]:
    """Return in how many cells the chosen learning rate is the lowest or highest tried, and of how many."""
    tried: dict[Identity, set[float]] = {}
    for r in records:
        if r.phase == "trial" and r.learning_rate is not None:
            tried.setdefault(identity(r.task, r.method, completed(r)), set()).add(r.learning_rate)
    chosen = {identity(r.task, r.method, completed(r)): r.learning_rate for r in final}
    ends = [chosen[key] in (min(tried[key]), max(tried[key])) for key in chosen if key in tried]
    return sum(ends), len(ends)


def files(records: Sequence[RunRecord], suite: Suite) -> dict[str, str]:
    """Return the page and its figures, by path below docs/."""
    cells = complete(records, suite)
    tables, drawn = results(cells)
    final = [r for runs in cells.values() for r in runs]
    settings = [RunConfig.model_validate({**t.settings, "model": "x", "data": "x"}) for t in suite.tasks.values()]
    checkpoints = any(each.gradient_checkpointing for each in settings)
    lost = Counter(r.status for r in records if r.status != "ok")
    facts = {
        **status(records, suite, cells), **tables, "suite": suite.suite, "alpha": f"{ALPHA:g}",
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
    made = str(jinja2.Template(words, undefined=jinja2.StrictUndefined, keep_trailing_newline=True).render(facts))
    return {PAGE.name: made, **{f"study/{name}.svg": figure for name, figure in drawn.items()}}


def main() -> None:
    """Write the page, its figures and the whole report; figures of another time go."""
    records = read_packed(PACK)
    made = files(records, load_suite("small"))
    for old in PACK.parent.glob("*.svg"):
        if f"study/{old.name}" not in made:
            old.unlink()
    for name, content in {**made, "study/report.html": report.page.render(report.build(records))}.items():
        atomic_write(PAGE.parent / name, content)


if __name__ == "__main__":
    main()
