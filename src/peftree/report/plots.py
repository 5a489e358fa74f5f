"""The plots of one task: quality against cost, intervals, memory. Small multiples: `panels`; over tasks: `diagrams`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from peftree import text
from peftree.report import svg, tables
from peftree.report.data import Row, Task
from peftree.report.svg import Scale, num

WIDTH, HEIGHT = 560.0, 370.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 12.0, 12.0, 48.0
NAME = 22


@dataclass(frozen=True)
class Figure:
    """A drawn figure with the caption below it."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Cost:
    """An axis of cost: its name, how it is read from a row, and how it is written."""

    title: str
    of: Callable[[Row], float | None]
    write: Callable[[float | None], str]
    log: bool = False


COSTS = (
    Cost("trainable parameters", lambda row: row.trainable, text.count, log=True),
    Cost("peak memory", lambda row: row.costs.peak_rss_bytes, text.size),
    Cost("training time", lambda row: row.costs.train_seconds, text.seconds),
)


def figures(task: Task) -> list[Figure]:
    """Return all figures of `task` for which there is data, in reading order."""
    drawn = [whiskers(task), *(against(task, cost) for cost in COSTS), memory(task)]
    return [figure for figure in drawn if figure is not None]


def pareto(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[int]:
    """Return the indices of the points that no other beats: cheaper and at least as good.

    Sorted by cost; of equal points the first is kept.
    """
    sign = 1.0 if higher_is_better else -1.0
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1], i))
    front: list[int] = []
    best = float("-inf")
    for index in order:
        quality = sign * points[index][1]
        if quality > best:
            front.append(index)
            best = quality
    return front


def against(task: Task, cost: Cost) -> Figure | None:
    """Draw the score against a cost with the Pareto front and a label for each point."""
    known = [(row, cost.of(row), row.score) for row in task.scored]
    found = [(row, x, s) for row, x, s in known if x is not None and s is not None and (x or not cost.log)]
    if len(found) < 2:
        return None
    rows = [row for row, _, _ in found]
    values = [(x, s.value) for _, x, s in found]
    ends = [(s.low, s.high) if s.known else (s.value, s.value) for _, _, s in found]
    spread = max(x for x, _ in values) > 20 * min(x for x, _ in values) > 0
    across = svg.scale_over([x for x, _ in values], LEFT, WIDTH - RIGHT, log=cost.log or spread)
    up = svg.scale_over([e for pair in ends for e in pair], HEIGHT - BOTTOM, TOP)
    front = pareto(values, task.higher_is_better)
    points = [(across(x), up(y)) for x, y in values]
    corners = _corners(points, front)
    body = axes(across, up, cost.write, cost.title, task.metric)
    body.append(f'<path class="front" d="M{" ".join(f"{num(x)} {num(y)}" for x, y in corners)}"/>')
    for (x, _), (low, high), row in zip(points, ends, rows, strict=True):
        body.append(f'<path class="whisker b-{row.branch}" d="M{num(x)} {num(up(low))}V{num(up(high))}"/>')
    for index, ((x, y), row) in enumerate(zip(points, rows, strict=True)):
        body.append(svg.marker(row.branch, x, y, solid=index in front))
    body += labels_at(points, [svg.cut(row.label, NAME) for row in rows], corners)
    names = text.join([rows[index].label for index in front])
    title = f"{task.metric} against {cost.title}, {task.name}"
    caption = f"{task.metric} against {cost.title}"
    caption += " (log scale)" if across.log else ""
    absent = len(task.scored) - len(found)
    caption += f"; {text.plural(absent, 'method')} without a figure not drawn" if absent else ""
    drawn = svg.document(WIDTH, HEIGHT, title, f"On the Pareto front: {names}.", body)
    return Figure(caption, f"On the front: {names}.", drawn)


def whiskers(task: Task) -> Figure | None:
    """Draw every method's score with its interval; full fine-tuning's interval is shaded."""
    rows = [(row, s) for row in task.scored if (s := row.score) is not None]
    if not rows:
        return None
    left, right, line = 158.0, 14.0, 23.0
    height = TOP + line * len(rows) + BOTTOM
    values = [s.value for _, s in rows] + [end for _, s in rows if s.known for end in (s.low, s.high)]
    across = svg.scale_over(values, left, WIDTH - right)
    bottom = height - BOTTOM
    body = x_axis(across, bottom, svg.tick_text(across), task.metric)
    full = task.row(task.full)
    if full is not None and full.score is not None:
        middle = num(across(full.score.value))
        if full.score.known:
            low, high = across(full.score.low), across(full.score.high)
            body.append(
                f'<rect class="band" x="{num(low)}" y="{num(TOP)}" '
                f'width="{num(high - low)}" height="{num(bottom - TOP)}"/>'
            )
        body.append(f'<path class="mid" d="M{middle} {num(TOP)}V{num(bottom)}"/>')
    for index, (row, s) in enumerate(rows):
        y = TOP + line * (index + 0.5)
        body.append(name_at(row.label, left - 10, y))
        if s.known:
            start, end = num(across(s.low)), num(across(s.high))
            body.append(f'<path class="span b-{row.branch}" d="M{start} {num(y)}H{end}"/>')
        tip = f"<title>{escape(f'{row.label}: {value_of(task, row)}')}</title>"
        body.append(f"<g>{tip}{svg.marker(row.branch, across(s.value), y)}</g>")
    shaded = "Shaded: the interval of full fine-tuning." if full is not None else ""
    described = "; ".join(f"{row.label} {value_of(task, row)}" for row, _ in rows)
    title = f"{task.metric} with 95 % intervals, {task.name}"
    drawn = svg.document(WIDTH, height, title, described, body)
    return Figure(f"{task.metric} with 95 % intervals", shaded, drawn)


def memory(task: Task) -> Figure | None:
    """Draw peak memory as bars: after loading, and what training added on top, part by part where known."""
    rows = sorted(
        (row for row in task.scored if row.costs.peak_rss_bytes), key=lambda row: row.costs.peak_rss_bytes or 0.0
    )
    if not rows or not any(row.costs.rss_after_load_bytes for row in rows):
        return None
    left, line = 158.0, 23.0
    height = TOP + line * len(rows) + BOTTOM
    largest = max(max(row.costs.peak_rss_bytes or 0.0, row.costs.saved_for_backward_bytes or 0.0) for row in rows)
    across = Scale(0.0, largest * 1.02, left, WIDTH - 78)
    body = x_axis(across, height - BOTTOM, text.size, "peak memory", _binary_ticks(across))
    used: dict[str, str] = {}
    for index, row in enumerate(rows):
        y, peak, end = TOP + line * index, row.costs.peak_rss_bytes or 0.0, 0.0
        body.append(name_at(row.label, left - 10, y + line / 2))
        for css, said, size in _parts(row):
            body.append(_bar(css, across, end, min(end + size, peak), y + 3, 11))
            end, used[css] = min(end + size, peak), said
        if row.costs.saved_for_backward_bytes is not None and row.costs.rest_bytes is None:
            body.append(_bar("saved", across, 0, row.costs.saved_for_backward_bytes, y + 15, 4))
            used["saved"] = "of it saved for backward (counted by itself)"
        x = num(across(peak) + 5)
        body.append(f'<text class="t" x="{x}" y="{num(y + 13)}">{text.size(peak)}</text>')
    described = "; ".join(
        f"{row.label} {text.size(row.costs.peak_rss_bytes)}, after loading {text.size(row.costs.rss_after_load_bytes)}"
        for row in rows
    )
    keys = " ".join(f'<span class="key {css}"></span> {said}' for css, said in used.items())
    drawn = svg.document(WIDTH, height, f"Peak memory, {task.name}", described, body)
    return Figure("Peak resident memory", Markup(keys), drawn)


def _parts(row: Row) -> list[tuple[str, str, float]]:
    """Return the parts of a row's peak: class, name and bytes."""
    c = row.costs
    loaded = min(c.rss_after_load_bytes or 0.0, c.peak_rss_bytes or 0.0)
    if c.rest_bytes is None:
        return [("load", "after loading", loaded), ("train", "added by training", (c.peak_rss_bytes or 0.0) - loaded)]
    return [
        ("load", "after loading", loaded),
        ("gradients", "gradients", c.gradient_bytes or 0.0),
        ("optimizer", "optimizer", c.optimizer_bytes or 0.0),
        ("saved", "saved for backward", c.saved_for_backward_bytes or 0.0),
        ("train", "rest", c.rest_bytes),
    ]


def _bar(css: str, across: Scale, low: float, high: float, y: float, height: float) -> str:
    x = across(low)
    return f'<path class="bar {css}" d="M{num(x)} {num(y)}h{num(max(0.0, across(high) - x))}v{num(height)}H{num(x)}"/>'


def _binary_ticks(across: Scale) -> list[float]:
    """Return tick values that are round in MiB or GiB."""
    unit = 2.0**30 if across.high >= 2**31 else 2.0**20 if across.high >= 2**21 else 1.0
    scaled = Scale(across.low / unit, across.high / unit, across.start, across.end)
    return [tick * unit for tick in scaled.ticks(4)]


def value_of(task: Task, row: Row) -> str:
    """Return a row's score with its interval as text."""
    if row.score is None:
        return "no score"
    ends = tables.interval(row.score, task.decimals)
    return f"{text.score(row.score.value, task.decimals)} {ends}"


def name_at(label: str, x: float, y: float) -> str:
    """Return a method's name that ends at `x`, with the full name as a tooltip if it is cut."""
    shown = escape(svg.cut(label, NAME))
    tip = f"<title>{escape(label)}</title>" if len(label) > NAME else ""
    return f'<text class="t end" x="{num(x)}" y="{num(y + 4)}">{tip}{shown}</text>'


def axes(across: Scale, up: Scale, write: Callable[[float], str], x_title: str, y_title: str) -> list[str]:
    """Return grid, ticks and titles of a two-dimensional plot."""
    ticks = _binary_ticks(across) if write is text.size and not across.log else None
    body = x_axis(across, up.start, write, x_title, ticks)
    show = svg.tick_text(up)
    for value in up.ticks():
        y = num(up(value))
        body.append(f'<path class="grid" d="M{num(LEFT)} {y}H{num(across.end)}"/>')
        body.append(f'<text class="t end" x="{num(LEFT - 6)}" y="{num(up(value) + 4)}">{show(value)}</text>')
    middle = num((up.start + up.end) / 2)
    body.append(f'<text class="a" transform="translate(13 {middle}) rotate(-90)">{escape(y_title)}</text>')
    return body


def x_axis(
    across: Scale,
    bottom: float,
    write: Callable[[float], str],
    title: str,
    ticks: list[float] | None = None,
) -> list[str]:
    """Return vertical grid lines, ticks and the title of the horizontal axis."""
    body = []
    for value in across.ticks() if ticks is None else ticks:
        x = num(across(value))
        body.append(f'<path class="grid" d="M{x} {num(TOP)}V{num(bottom)}"/>')
        body.append(f'<text class="t mid" x="{x}" y="{num(bottom + 16)}">{escape(write(value))}</text>')
    middle = num((across.start + across.end) / 2)
    body.append(f'<path class="axis" d="M{num(across.start)} {num(bottom)}H{num(across.end)}"/>')
    body.append(f'<text class="a" x="{middle}" y="{num(bottom + 36)}">{escape(title)}</text>')
    return body


def _corners(points: Sequence[tuple[float, float]], front: Sequence[int]) -> list[tuple[float, float]]:
    """Return the corners of the Pareto staircase, from the cheapest point to the right edge."""
    corners = [points[front[0]]]
    for index in front[1:]:
        corners += [(points[index][0], corners[-1][1]), points[index]]
    return [*corners, (WIDTH - RIGHT, corners[-1][1])]


def labels_at(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    corners: Sequence[tuple[float, float]],
) -> list[str]:
    """Return the labels, with a thin leader line for a label away from its point."""
    body = []
    frame = (LEFT + 2, TOP, WIDTH - 2, HEIGHT - BOTTOM - 2)
    lines = [
        (min(x, a) - 2, min(y, b) - 2, max(x, a) + 2, max(y, b) + 2) for (x, y), (a, b) in itertools.pairwise(corners)
    ]
    places = svg.place_labels(points, labels, frame, lines)
    for (x, y), (a, b), label in zip(points, places, labels, strict=True):
        box = svg.text_box(a, b, label)
        near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        if abs(near[0] - x) + abs(near[1] - y) > 14:
            body.append(f'<path class="lead" d="M{num(x)} {num(y)}L{num(near[0])} {num(near[1])}"/>')
        body.append(f'<text class="t halo" x="{num(a)}" y="{num(b)}">{escape(label)}</text>')
    return body
