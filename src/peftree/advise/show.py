"""The advice for the terminal: a table, and the reasons below it."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peftree.advise.advice import Advice, Judged, Recommendation
from peftree.advise.cost import Cost, size
from peftree.advise.measures import Forgetting
from peftree.advise.probe import Probed, Tried

OTHERS = 8  # candidates that are listed beyond the recommended ones


def render(advice: Advice) -> RenderableType:
    """Return the advice for a terminal."""
    parts: list[RenderableType] = [Text(line) for line in _heads(advice)]
    parts.append(_table(advice.recommended))
    for number, one in enumerate(advice.recommended, 1):
        parts.append(Text(f"{number}. {one.judged.candidate.label}", style="bold"))
        parts += [Text(f"   {line}") for line in _lines(one)]
    parts += _rest(advice)
    return Group(*parts)


def _heads(advice: Advice) -> list[str]:
    m, d, how = advice.model, advice.data, advice.setting
    towers = ", ".join(f"{count} sites in {name}" for name, count in m.towers.items())
    lines = [f"Model: {m.source}, {m.name}, {m.parameters:,} parameters; {towers}"]
    rows = f"Data: {d.path}, {d.task}, {d.rows:,} training rows"
    if d.classes:
        rows += f" in {d.classes} classes (the rarest has {d.smallest})"
    if d.tokens:
        about = "" if d.counted else "about "
        rows += f"; {about}{d.tokens[0]} tokens (median), {about}{d.tokens[2]} at 99 %, {about}{d.tokens[3]} at most"
    lines.append(rows)
    lines += [f"   note: {line}" for line in d.notes]
    precision = f"{m.dtype or 'float32'}, its own" if how.dtype == "auto" else how.dtype
    lines.append(
        f"Budget: {size(advice.asked.memory)}; goal: {advice.asked.goal}; base in {precision}"
        + (f", rows of {how.length} tokens" if d.tokens else "")
        + (f", images of {how.image} pixels" if how.image else "")
    )
    return lines


def _table(recommended: Sequence[Recommendation]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    table.add_column("candidate", overflow="fold", min_width=16)
    for name in ("memory", "max batch", "quality [95 %]", "vs full", "tasks/runs"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, one in enumerate(recommended, 1):
        e, cost = one.judged.estimate, one.judged.cost
        assert cost is not None
        quality = f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" if e.known else "unknown"
        table.add_row(
            str(number), escape(one.judged.candidate.label), size(cost.plan.expected), f"{cost.largest:,}",
            escape(quality), f"{one.judged.against[0]:+.2f}" if one.judged.against else "", f"{e.tasks}/{e.runs}",
        )  # fmt: skip
    return table


def _lines(one: Recommendation) -> list[str]:
    judged, cost = one.judged, one.judged.cost
    assert cost is not None
    lines = [f"why: {line}" for line in one.why]
    if one.separable is not None:
        lines.append(
            "quality against the first: " + ("a difference is shown" if one.separable else "no difference shown")
        )
    lines.append(f"memory: {memory(cost)}")
    lines.append(f"forgets: {forgotten(judged.forgets)}")
    took = f"{judged.time:.2f} of full fine-tuning's time, as measured" if judged.time else "unknown"
    lines.append(f"a step takes: {took}")
    lines.append(f"served by: {judged.serving.text}")
    lines += [f"   {note}" for note in judged.serving.notes]
    lines.append(f"learning rate: {rate(judged)}")
    return lines


def memory(cost: Cost) -> str:
    """Return what a candidate takes, as a sentence."""
    p = cost.plan
    said = f"{size(p.expected)} expected, {size(p.high)} at most, with {cost.batch} rows at a time"
    if cost.accumulation > 1:
        said += f", {cost.accumulation} times per step"
    if cost.checkpointing:
        said += ", gradient checkpointing"
    said += f"; {p.trainable:,} of {p.total:,} parameters trained" + ("" if p.how == "traced" else " (a rule of thumb)")
    return said + (f"; {cost.largest:,} rows at a time would fit" if cost.largest else "")


def forgotten(found: Forgetting | None) -> str:
    """Return what was lost, as measured, for the nearest task first."""
    if found is None:
        return "unknown: it was not measured"
    task, what, figure, full = found.measured[0]
    beside = f", full fine-tuning {full:+.3g}" if full is not None else ""
    return f"{figure:+.3g}{beside} ({what}; {task})"


def rate(judged: Judged) -> str:
    """Return the learning rate to start from, as a sentence."""
    if judged.rate is None:
        return "the method's default; nothing was measured"
    tasks = f"{judged.rate.tasks} task{'s' * (judged.rate.tasks != 1)}"
    return f"{judged.rate.times:.2g} times the method's default, from the best of {tasks}; tune it"


def _rest(advice: Advice) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for label, why in list(advice.misfits.items())[:OTHERS]:
        parts.append(Text(f"Not chosen: {label}: {why}"))
    others = [f"{j.candidate.label} {j.estimate.value:.2f}" for j in advice.others if j.estimate.known][:OTHERS]
    if others:
        parts.append(Text(f"Next by the evidence: {', '.join(others)}"))
    unknown = [j.candidate.label for j in advice.others if not j.estimate.known]
    if unknown:
        parts.append(Text(f"Quality unknown: {', '.join(unknown)}"))
    parts += [Text(f"Rule: {r.rule} [{r.source}]") for r in advice.rules]
    parts += [Text(f"Note: {line}") for line in advice.notes]
    parts += [Text(f"Evidence: {line}") for line in advice.origins]
    return parts


def render_probe(found: Probed) -> RenderableType:
    """Return what a probe measured, for a terminal."""
    way = "more" if found.higher_is_better else "less"
    before = f"; {found.before:.4g} without training" if found.before is not None else ""
    title = f"Measured on your data: {found.metric} ({way} is better) on {found.rows} validation rows{before}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", collapse_padding=True)
    table.add_column("candidate", overflow="fold", min_width=16)
    for name in ("score [95 %]", "steps", "lr", "memory", "s"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("against the best", overflow="fold")
    for t in found.tried:
        table.add_row(
            escape(t.candidate.label), escape(_interval(t)), str(t.steps), f"{t.lr:.2g}",
            size(t.peak) if t.peak else "", f"{t.seconds:.0f}", t.verdict,
        )  # fmt: skip
    lines = [f"{found.runs} runs, {found.spent:.0f} s; memory is the peak of the process, including libraries"]
    lines += [f"{t.candidate.label}: {t.text}" for t in found.tried if t.score is None]
    return Group(table, *(Text(f"Note: {line}") for line in [*lines, *found.notes]))


def _interval(t: Tried) -> str:
    if t.score is None:
        return ""
    return f"{t.score:.4g}" + (f" [{t.low:.3g}, {t.high:.3g}]" if t.low is not None and t.high is not None else "")
