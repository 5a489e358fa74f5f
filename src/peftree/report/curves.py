"""Learning curves as small multiples: one panel a method, all others in grey behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from peftree.bench.record import CurvePoint
from peftree.report import svg, text
from peftree.report.data import Report, Row, Task
from peftree.report.svg import Scale, escape, num

WIDTH, HEIGHT = 200.0, 128.0
LEFT, RIGHT, TOP, BOTTOM = 34.0, 6.0, 20.0, 18.0
PAGE_POINTS = 8000  # points on the whole page; more runs get fewer points each
Quantity = Callable[[CurvePoint], float | None]


@dataclass(frozen=True)
class Panels:
    """The panels of one task and one quantity, and the paths they share."""

    title: str
    shared: Markup
    panels: tuple[Markup, ...]


def panels(task: Task, report: Report) -> list[Panels]:
    """Return the panels for the loss and, where recorded, for the score."""
    curves = sum(len(row.curves) for other in report.tasks for row in other.rows)
    points = max(6, min(40, PAGE_POINTS // max(1, 2 * curves)))
    drawn = [
        _draw(task, "loss", lambda point: point.loss, points, robust=True),
        _draw(task, task.metric, lambda point: point.score, points, robust=False),
    ]
    return [each for each in drawn if each is not None]


def thin(steps: list[float], values: list[float], points: int) -> list[tuple[float, float]]:
    """Return at most `points` means over neighbouring values; the first and last are kept."""
    if len(steps) <= points:
        return list(zip(steps, values, strict=True))
    inner = np.array_split(np.arange(1, len(steps) - 1), points - 2)
    middle = [(float(np.mean([steps[i] for i in part])), float(np.mean([values[i] for i in part]))) for part in inner]
    return [(steps[0], values[0]), *middle, (steps[-1], values[-1])]


def _draw(task: Task, name: str, quantity: Quantity, points: int, *, robust: bool) -> Panels | None:
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in task.scored:
        for curve in row.curves:
            pairs = [(float(p.step), quantity(p)) for p in curve.points]
            known = sorted((x, y) for x, y in pairs if y is not None)
            if len(known) > 1:
                xs, ys = [x for x, _ in known], [y for _, y in known]
                lines[row.label, curve.seed] = thin(xs, ys, points)
    if not lines:
        return None
    values = [y for line in lines.values() for _, y in line]
    low, high = min(values), max(values)
    if robust:
        # One diverged run must not flatten all others; its line is cut at the top edge.
        high = min(high, 1.5 * float(np.quantile(values, 0.97)) + 1e-9)
    up = svg.scale_over([low, high], HEIGHT - BOTTOM, TOP, pad=0.04)
    across = Scale(0.0, max(x for line in lines.values() for x, _ in line) or 1.0, LEFT, WIDTH - RIGHT)
    prefix = f"{task.anchor}-{'loss' if robust else 'score'}"
    ids = {key: f"{prefix}-{index}" for index, key in enumerate(lines)}
    paths = "".join(_path(ids[key], line, across, up) for key, line in lines.items())
    shared = f'<svg class="defs" aria-hidden="true"><defs><g id="{prefix}">{paths}</g></defs></svg>'
    drawn = [
        _panel(row, name, prefix, {k: ids[k] for k in lines if k[0] == row.label}, lines, across, up)
        for row in task.scored
        if any(key[0] == row.label for key in lines)
    ]
    return Panels(f"{name} against step", Markup(shared), tuple(drawn))


def _path(name: str, line: list[tuple[float, float]], across: Scale, up: Scale) -> str:
    places = " ".join(f"{num(across(x))} {num(up(y))}" for x, y in line)
    return f'<path id="{name}" d="M{places}"/>'


def _panel(
    row: Row,
    name: str,
    bundle: str,
    ids: dict[tuple[str, int], str],
    lines: dict[tuple[str, int], list[tuple[float, float]]],
    across: Scale,
    up: Scale,
) -> Markup:
    """Return the panel of one method: its seeds in its branch's colour over the grey rest."""
    ticks = up.ticks(3)
    write = svg.tick_text(Scale(up.low, up.high, up.start, up.end))
    body = [
        f'<path class="grid" d="M{num(LEFT)} {num(up(tick))}H{num(WIDTH - RIGHT)}"/>'
        f'<text class="t s end" x="{num(LEFT - 4)}" y="{num(up(tick) + 3)}">{write(tick)}</text>'
        for tick in ticks
    ]
    body.append(svg.marker(row.branch, LEFT + 5, 10, radius=4))
    body.append(f'<text class="t" x="{num(LEFT + 14)}" y="14">{escape(svg.cut(row.label, 24))}</text>')
    body.append(f'<use class="ghost" href="#{bundle}"/>')
    body += [f'<use class="line b-{row.branch}" href="#{one}"/>' for one in ids.values()]
    bottom = num(HEIGHT - 5)
    body.append(f'<text class="t s" x="{num(LEFT)}" y="{bottom}">step 0</text>')
    body.append(f'<text class="t s end" x="{num(WIDTH - RIGHT)}" y="{bottom}">{across.high:.0f}</text>')
    said = [
        f"seed {seed} from {lines[label, seed][0][1]:.3g} to {lines[label, seed][-1][1]:.3g}" for label, seed in ids
    ]
    title = f"{row.label}: {name} against step"
    return svg.document(WIDTH, HEIGHT, title, text.join(said), body, "panel")
