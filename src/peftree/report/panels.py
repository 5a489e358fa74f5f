"""Small multiples: one panel per method, with its lines in its branch's colour over all others in grey."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from markupsafe import Markup

from peftree import text
from peftree.bench.intervals import Interval
from peftree.probes.noise import Damaged
from peftree.report import svg
from peftree.report.data import Report, Row, Task
from peftree.report.svg import Scale, num
from peftree.runs.record import CurvePoint

WIDTH, HEIGHT = 200.0, 128.0
LEFT, RIGHT, TOP, BOTTOM = 34.0, 8.0, 20.0, 18.0
PAGE_POINTS = 8000  # points on the whole page; more runs get fewer points each
PAGE_PANELS = 450  # on the whole page; a larger report leaves out what its tables say too
Point = tuple[float, float]
Quantity = Callable[[CurvePoint], float | None]


@dataclass(frozen=True)
class Trace:
    """What one panel shows of one line: points in order of x, a band of (x, low, high), marks below."""

    label: str
    branch: str
    name: str
    points: tuple[Point, ...]
    band: tuple[tuple[float, float, float], ...] = ()
    crosses: tuple[float, ...] = ()
    dots: bool = False


@dataclass(frozen=True)
class Axes:
    """How to read the panels of one group: what x is and how its ends are written."""

    x: str
    write: Callable[[float], str] = field(default=lambda value: f"{value:.0f}")
    log: bool = False
    from_zero: bool = False
    robust: bool = False


@dataclass(frozen=True)
class Panels:
    """The panels of one task and one quantity, and the paths they share."""

    title: str
    caption: str
    shared: Markup
    panels: tuple[Markup, ...]


@dataclass(frozen=True)
class Series:
    """A curve over tasks that differ in only one respect: its name and where it goes."""

    what: str
    alike: tuple[str, ...]
    axes: Axes
    at_largest: bool = True


SERIES = {
    "share": Series(
        "share of the training rows", ("setting", "wrong"), Axes("", lambda value: f"{value:.0%}", log=True)
    ),
    "wrong": Series(
        "share of wrong training labels", ("setting", "share"), Axes("", lambda value: f"{value:.0%}"), at_largest=False
    ),
    "parameters": Series("parameters of the base", ("family", "share", "wrong"), Axes("", text.count, log=True)),
}


def panels(task: Task, report: Report) -> list[Panels]:
    """Return the groups of panels for which `task` has data, in reading order.

    The most informative come first: if the page would get too many panels, the last ones are left out.
    """
    score, loss = _learning(task, report)
    found = [
        capacity(task),
        *(series(task, report, name) for name in SERIES),
        sensitivity(task),
        loss,
        *(severities(task, name) for name in ("noise", "corruptions")),
        expected(task),
        score,
    ]
    drawn = [each for each in found if each is not None]
    rows = sum(len(other.rows) for other in report.tasks)
    return drawn[: max(1, PAGE_PANELS // max(1, rows))]


def _learning(task: Task, report: Report) -> list[Panels | None]:
    """Return score and loss against the step, if recorded."""
    curves = sum(len(row.curves) for other in report.tasks for row in other.rows)
    most = max(5, min(40, PAGE_POINTS // max(1, 2 * curves)))
    kinds: tuple[tuple[str, str, Quantity, bool], ...] = (
        ("score", task.metric, lambda point: point.score, False),
        ("loss", "loss", lambda point: point.loss, True),
    )
    out = []
    for key, name, quantity, robust in kinds:
        traces = []
        for row in task.scored:
            for curve in row.curves:
                pairs = [(float(p.step), quantity(p)) for p in curve.points]
                known = sorted((x, y) for x, y in pairs if y is not None)
                if len(known) > 1:
                    points = thin([x for x, _ in known], [y for _, y in known], most)
                    traces.append(Trace(row.label, row.branch, f"seed {curve.seed}", tuple(points)))
        caption = "One line a seed; all other methods in grey. Long curves are averaged over neighbouring steps."
        axes = Axes("step", from_zero=True, robust=robust)
        out.append(draw(f"{task.anchor}-{key}", f"{name} against step", caption, traces, axes))
    return out


def sensitivity(task: Task) -> Panels | None:
    """Return the trials' score against their learning rate."""
    traces = []
    for one in task.tuning:
        points = tuple((t.rate, t.score) for t in one.trials if t.score is not None)
        lost = tuple(t.rate for t in one.trials if t.score is None)
        traces.append(Trace(one.label, one.branch, "trials", points, crosses=lost, dots=True))
    caption = "Trials on validation rows, one point each; a cross at the bottom is a trial without a score."
    title = f"{task.metric} against learning rate"
    axes = Axes("rate", lambda value: f"{value:.1g}", log=True)
    return draw(f"{task.anchor}-rate", title, caption, traces, axes)


def capacity(task: Task) -> Panels | None:
    """Return the score against the number of trained parameters, for methods that were run with three sizes or more."""
    groups: dict[str, list[Row]] = {}
    for row in task.scored:
        groups.setdefault(row.method, []).append(row)
    traces = [
        _with_intervals(name, rows[0].branch, [(float(row.trainable or 0), row.score) for row in rows], "sizes")
        for name, rows in groups.items()
        if len({row.trainable for row in rows if row.trainable}) > 2
    ]
    caption = "One point a choice of fields, with its 95 % interval; all other methods in grey."
    axes = Axes("", text.count, log=True)
    return draw(f"{task.anchor}-size", f"{task.metric} against trained parameters", caption, traces, axes)


def series(task: Task, report: Report, name: str) -> Panels | None:
    """Return the score against the only difference between tasks: `name` is a key of SERIES, an attribute of a task.

    The curve goes to the task with the most rows, the fewest wrong labels, the largest base.
    """
    kind = SERIES[name]
    alike = [t for t in report.tasks if all(getattr(t, same) == getattr(task, same) for same in kind.alike)]
    ends = {getattr(t, name): t for t in sorted(alike, key=lambda t: len(t.scored))}  # of equal ones the fullest
    if len(ends) < 2 or ends[max(ends) if kind.at_largest else min(ends)] is not task:
        return None
    traces = []
    for row in task.scored:
        found = [(x, other.row(row.label)) for x, other in sorted(ends.items())]
        points = [(x, each.score) for x, each in found if each is not None]
        if len(points) > 1:
            traces.append(_with_intervals(row.label, row.branch, points, name))
    over = text.join([f"{t.name} ({kind.axes.write(x)})" for x, t in sorted(ends.items())])
    caption = f"Over {over}, with 95 % intervals."
    return draw(f"{task.anchor}-{name}", f"{task.metric} against {kind.what}", caption, traces, kind.axes)


def _with_intervals(label: str, branch: str, found: Sequence[tuple[float, Interval | None]], name: str) -> Trace:
    """Return a trace of scores with the band of their intervals."""
    known = sorted((x, s.value, s.low, s.high) for x, s in found if s is not None)
    points = tuple((x, y) for x, y, _, _ in known)
    band = tuple((x, low, high) for x, _, low, high in known if math.isfinite(high - low))
    return Trace(label, branch, name, points, band, dots=True)


def expected(task: Task) -> Panels | None:
    """Return the expected best score against the cost of the trials: seconds, else their number."""
    timed = all(one.expected is None or one.expected.seconds[-1] > 0 for one in task.tuning)
    traces = []
    for one in task.tuning:
        e = one.expected
        if e is None:
            continue
        xs = e.seconds if timed else tuple(float(count) for count in e.trials)
        band = tuple(zip(xs, e.low, e.high, strict=True))
        traces.append(
            Trace(one.label, one.branch, "expected best", tuple(zip(xs, e.value, strict=True)), band, dots=True)
        )
    caption = (
        "Expected best validation score of 1, 2, ... random trials (one point each), up to half of those run, "
        "with a 95 % bootstrap band over trials; the band is somewhat short, as no resample beats the best trial."
    )
    axes = Axes("", text.seconds if timed else lambda value: f"{text.plural(round(value), 'trial')}")
    title = f"expected best {task.metric} against {'time of tuning' if timed else 'trials'}"
    return draw(f"{task.anchor}-best", title, caption, traces, axes)


def severities(task: Task, name: str) -> Panels | None:
    """Return the score against the severity of damage to the input; 0 is clean."""
    traces = []
    for row in task.scored:
        found = row.probes.get(name)
        if isinstance(found, Damaged):
            points = tuple((float(level), y) for level, y in enumerate((found.clean, *found.severities)))
            traces.append(Trace(row.label, row.branch, "all kinds", points, dots=True))
    what = "text noise" if name == "noise" else "image corruptions"
    caption = "0 is clean. Means over the kinds of damage and the seeds."
    return draw(
        f"{task.anchor}-{name}-lines", f"{task.metric} against severity of {what}", caption, traces, Axes("severity")
    )


def thin(steps: list[float], values: list[float], points: int) -> list[Point]:
    """Return at most `points` means over neighbouring values; the first and last are kept."""
    if len(steps) <= points:
        return list(zip(steps, values, strict=True))
    inner = np.array_split(np.arange(1, len(steps) - 1), points - 2)
    middle = [(float(np.mean([steps[i] for i in part])), float(np.mean([values[i] for i in part]))) for part in inner]
    return [(steps[0], values[0]), *middle, (steps[-1], values[-1])]


def draw(prefix: str, title: str, caption: str, traces: Sequence[Trace], axes: Axes) -> Panels | None:
    """Return one panel per label over one pair of scales; None if no trace has a point."""
    values = [y for trace in traces for _, y in trace.points]
    values += [end for trace in traces for _, low, high in trace.band for end in (low, high)]
    xs = [x for trace in traces for x in (*(x for x, _ in trace.points), *trace.crosses)]
    if not values:
        return None
    high = max(values)
    if axes.robust:
        # One diverged run must not flatten all others; its line is cut at the top edge.
        high = min(high, 1.5 * float(np.quantile(values, 0.97)) + 1e-9)
    up = svg.scale_over([min(values), high], HEIGHT - BOTTOM, TOP, pad=0.06)
    if axes.from_zero:
        across = Scale(0.0, max(xs) or 1.0, LEFT, WIDTH - RIGHT)
    else:
        across = svg.scale_over(xs, LEFT, WIDTH - RIGHT, log=axes.log, pad=0.02)
    by_label: dict[str, list[Trace]] = {}
    for trace in traces:
        by_label.setdefault(trace.label, []).append(trace)
    groups = list(by_label.values())
    pairs = [_drawn(f"{prefix}-{index}", group, across, up) for index, group in enumerate(groups)]
    paths, own = ("".join(part) for part in zip(*pairs, strict=True))
    shared = f'<g id="{prefix}">{_frame(across, up, xs, axes)}<g class="ghost">{paths}</g></g>{own}'
    drawn = tuple(_panel(prefix, index, title, group) for index, group in enumerate(groups))
    return Panels(title, caption, Markup(f'<svg class="defs" aria-hidden="true"><defs>{shared}</defs></svg>'), drawn)


def _drawn(name: str, traces: Sequence[Trace], across: Scale, up: Scale) -> tuple[str, str]:
    """Return the traces of one label as a group that panels refer to, and what only its own panel shows."""
    lines, own = "", ""
    low = HEIGHT - BOTTOM - 4
    for trace in traces:
        places = [f"{num(across(x))} {num(up(y))}" for x, y in trace.points]
        lines += f'<path d="M{" ".join(places)}"/>' if len(places) > 1 else ""
        if trace.dots:  # lines of no length with round ends
            lines += f'<path class="dots" d="{"".join(f"M{place}h0" for place in places)}"/>'
        if trace.band:
            ends = [*((x, high) for x, _, high in trace.band), *((x, low) for x, low, _ in reversed(trace.band))]
            own += f'<path class="zone" d="M{" ".join(f"{num(across(x))} {num(up(y))}" for x, y in ends)}Z"/>'
        crosses = "".join(f"M{num(across(x) - 2.5)} {num(low - 2.5)}l5 5m0 -5l-5 5" for x in trace.crosses)
        own += f'<path class="cross" d="{crosses}"/>' if crosses else ""
    return f'<g id="{name}">{lines}</g>', f'<g id="{name}-o">{own}</g>' if own else ""


def _frame(across: Scale, up: Scale, xs: Sequence[float], axes: Axes) -> str:
    """Return grid, tick labels and the ends of x: the same for all panels of a group."""
    write = svg.tick_text(up)
    body = [
        f'<path class="grid" d="M{num(LEFT)} {num(up(tick))}H{num(WIDTH - RIGHT)}"/>'
        f'<text class="t s end" x="{num(LEFT - 4)}" y="{num(up(tick) + 3)}">{write(tick)}</text>'
        for tick in up.ticks(3)
    ]
    bottom = num(HEIGHT - 5)
    first = 0.0 if axes.from_zero else min(xs)
    body.append(
        f'<text class="t s" x="{num(LEFT)}" y="{bottom}">{escape(f"{axes.x} {axes.write(first)}".strip())}</text>'
    )
    last = escape(axes.write(max(xs)))
    body.append(f'<text class="t s end" x="{num(WIDTH - RIGHT)}" y="{bottom}">{last}</text>')
    return "".join(body)


def _panel(prefix: str, index: int, title: str, traces: Sequence[Trace]) -> Markup:
    """Return the panel of one method: its traces in its branch's colour over the grey rest."""
    first = traces[0]
    body = [f'<use href="#{prefix}"/>', svg.marker(first.branch, LEFT + 5, 10)]
    body.append(f'<text class="t" x="{num(LEFT + 16)}" y="14">{escape(svg.cut(first.label, 24))}</text>')
    own = any(trace.band or trace.crosses for trace in traces)
    uses = "".join(f'<use href="#{prefix}-{index}{part}"/>' for part in (["-o", ""] if own else [""]))
    body.append(f'<g class="line b-{first.branch}">{uses}</g>')
    said = [f"{t.name} from {t.points[0][1]:.3g} to {t.points[-1][1]:.3g}" for t in traces if t.points]
    return svg.document(WIDTH, HEIGHT, f"{first.label}: {title}", text.join(said) or "no score", body, "panel")
