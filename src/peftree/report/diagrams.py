"""Figures besides a task's plots: the critical-difference diagram, retention against gain."""

from __future__ import annotations

from html import escape

from peftree import text
from peftree.bench.grouping import HEAD_ONLY
from peftree.bench.ranks import Ranks
from peftree.probes.retention import Found
from peftree.report import plots, svg
from peftree.report.data import Overview, Report, Task
from peftree.report.plots import BOTTOM, HEIGHT, LEFT, NAME, RIGHT, TOP, WIDTH, Figure
from peftree.report.svg import Scale, num

ROW = 17.0


def critical_difference(overview: Overview, report: Report) -> Figure | None:
    """Draw mean ranks on an axis, best to the left; a bar joins methods that are not distinguished."""
    ranks = overview.ranks
    if ranks is None:
        return None
    branches = {row.label: row.branch for task in report.tasks for row in task.rows}
    k = len(ranks.names)
    left, right = 150.0, WIDTH - 150.0
    across = Scale(1.0, float(k), left, right)
    bars = 34.0 + 6.0 * len(ranks.groups)
    half = (k + 1) // 2
    body = _ruler(across, k, ranks.critical)
    for index, (first, last) in enumerate(ranks.groups):
        start, end = across(ranks.means[first]) - 3, across(ranks.means[last]) + 3
        body.append(f'<path class="clique" d="M{num(start)} {num(38 + 6 * index)}H{num(end)}"/>')
    for index, (name, mean) in enumerate(zip(ranks.names, ranks.means, strict=True)):
        on_left = index < half
        y = bars + 14 + ROW * (index if on_left else k - 1 - index)
        x, edge = across(mean), left - 14 if on_left else right + 14
        body.append(f'<path class="stem" d="M{num(x)} 28V{num(y)}H{num(edge)}"/>')
        body.append(svg.marker(branches[name], edge, y))
        shown = escape(f"{svg.cut(name, NAME - 4)} {mean:.2f}")
        where = f'class="t end" x="{num(edge - 10)}"' if on_left else f'class="t" x="{num(edge + 10)}"'
        body.append(f'<text {where} y="{num(y + 4)}"><title>{escape(name)}</title>{shown}</text>')
    said = "; ".join(f"{name} {mean:.2f}" for name, mean in zip(ranks.names, ranks.means, strict=True))
    drawn = svg.document(WIDTH, bars + 20 + ROW * half, f"Mean ranks, {overview.suite}", said, body)
    return Figure("Mean ranks with the critical difference", _caption(ranks), drawn)


def _ruler(across: Scale, k: int, critical: float) -> list[str]:
    """Return the axis of ranks with the critical difference drawn above it."""
    body = [f'<path class="axis" d="M{num(across.start)} 28H{num(across.end)}"/>']
    step = max(1, round((k - 1) / 8))
    for rank in range(1, k + 1, step):
        x = num(across(rank))
        body.append(f'<path class="axis" d="M{x} 24V28"/><text class="t s mid" x="{x}" y="20">{rank}</text>')
    end = across(min(1 + critical, k))
    body.append(f'<path class="span" d="M{num(across.start)} 6H{num(end)}"/>')
    wider = " (wider than the axis)" if 1 + critical > k else ""
    body.append(f'<text class="t s" x="{num(end + 6)}" y="9">CD {critical:.2f}{wider}</text>')
    return body


def _caption(ranks: Ranks) -> str:
    alike = "" if ranks.p < 0.05 else " The test does not show that the methods differ at all."
    return (
        f"{text.plural(ranks.tasks, 'task')}; 1 is best. A bar joins methods whose mean ranks differ by less than "
        f"the critical difference {ranks.critical:.2f} (Nemenyi, level .05). Friedman's test that all are alike: "
        f"p = {ranks.p:.2g}.{alike}"
    )


def retention(task: Task) -> Figure | None:
    """Draw what a method keeps of general abilities against what it gains on the task."""
    head = next((row for row in task.scored if row.method == HEAD_ONLY), None)
    if head is None or head.score is None:
        return None
    sign = 1.0 if task.higher_is_better else -1.0
    kept = ((row, row.score, row.probes.get("retention")) for row in task.scored)
    found = [(row, s.value, kept) for row, s, kept in kept if s and isinstance(kept, Found)]
    if len(found) < 2 or len({kept.measure for _, _, kept in found}) > 1:
        return None
    rows, measure = [row for row, _, _ in found], text.clean(found[0][2].measure)
    keep = -1.0 if measure == "perplexity" else 1.0
    points = [(sign * (value - head.score.value), keep * (kept.after - kept.before)) for _, value, kept in found]
    across = svg.scale_over([x for x, _ in points], LEFT, WIDTH - RIGHT)
    up = svg.scale_over([y for _, y in points] + [0.0], HEIGHT - BOTTOM, TOP)
    y_title = f"change in {measure}" if keep > 0 else f"fall of {measure}"
    better = "gain" if task.higher_is_better else "gain (fall)"
    body = plots.axes(across, up, svg.tick_text(across), f"{better} in {task.metric} over {head.label}", y_title)
    zero = num(up(0.0))
    body.append(f'<path class="mid" d="M{num(LEFT)} {zero}H{num(WIDTH - RIGHT)}"/>')
    places = [(across(x), up(y)) for x, y in points]
    front = plots.pareto([(-x, y) for x, y in points], higher_is_better=True)
    for index, (row, (gain, change), (x, y)) in enumerate(zip(rows, points, places, strict=True)):
        tip = f"{row.label}: gain {gain:.3g}, {measure} {change:+.3g}"
        body.append(f"<g><title>{escape(tip)}</title>{svg.marker(row.branch, x, y, solid=index in front)}</g>")
    frame = [(LEFT, up(0.0)), (WIDTH - RIGHT, up(0.0))]
    body += plots.labels_at(places, [svg.cut(row.label, NAME) for row in rows], frame)
    caption = (
        f"Up: less lost on general data (change of {measure}, turned so that a loss is below 0); right: more "
        "gained on the task. Filled: no other method is better in both."
    )
    names = text.join([rows[index].label for index in front])
    drawn = svg.document(WIDTH, HEIGHT, f"Retention against gain, {task.name}", f"Not beaten in both: {names}.", body)
    return Figure("Retention against gain", caption, drawn)
