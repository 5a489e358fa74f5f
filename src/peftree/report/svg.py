"""The few SVG parts that the plots need: scales with ticks, branch symbols, label placement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

LINE = 13.0
Box = tuple[float, float, float, float]


def num(value: float) -> str:
    """Return a coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def cut(raw: str, limit: int) -> str:
    """Return `raw`, cut with an ellipsis if longer than `limit` characters."""
    return raw if len(raw) <= limit else raw[: limit - 1] + "\u2026"


def document(width: float, height: float, title: str, description: str, body: Sequence[str], css: str = "") -> Markup:
    """Return an accessible inline SVG: role, title and description first."""
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {num(width)} {num(height)}" role="img">'
        f"<title>{escape(title)}</title>"
        f"<desc>{escape(description)}</desc>{''.join(body)}</svg>"
    )


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from data to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of `value`, kept within the range."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        part = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + part * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Return round values within the range."""
        return self._decades() if self.log else self._steps(wanted)

    def _steps(self, wanted: int) -> list[float]:
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= raw * 0.75)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _decades(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for units in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
            found = [10.0**power * unit for power in powers for unit in units]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                return found
        return found


def scale_over(values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.06) -> Scale:
    """Return a scale over `values` with a margin on both sides; equal values get some room."""
    low, high = min(values), max(values)
    if log:
        if high <= low * 1.001:
            return Scale(low / 2, high * 2, start, end, True)
        room = (high / low) ** pad
        return Scale(low / room, high * room, start, end, True)
    if high - low <= 1e-12 * max(abs(high), 1.0):
        room = abs(high) * 0.05 or 1.0
    else:
        room = (high - low) * pad
    return Scale(low - room, high + room, start, end)


def tick_text(scale: Scale) -> Callable[[float], str]:
    """Return a formatter with enough decimals to distinguish neighbouring ticks."""
    ticks = scale.ticks()
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = 0
    while decimals < 6 and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:
        decimals += 1
    return lambda value: f"{value:.{decimals}f}".replace("-", "\u2212")


def marker(branch: str, x: float, y: float, *, solid: bool = True) -> str:
    """Return the symbol of a branch, defined once per page by `symbols`; hollow ones are off the Pareto front."""
    css = f"m b-{branch}{'' if solid else ' hollow'}"
    return f'<use class="{css}" href="#s-{branch}" x="{num(x)}" y="{num(y)}"/>'


def symbols() -> Markup:
    """Return the definitions of the branches' symbols, centred on 0 and about 10 wide."""
    shapes = {
        "selective": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "reparameterized": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        "hybrid": [(0, -1.3), (1.1, 0), (0, 1.3), (-1.1, 0)],
        "moe": _polygon(6, 1.15),
        "unified": [
            (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
            (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4),
        ],
        "reference": _polygon(5, 1.5, 0.62),
    }  # fmt: skip
    body = '<circle id="s-additive" r="5"/>'
    for branch, corners in shapes.items():
        points = " ".join(f"{num(5 * a)},{num(5 * b)}" for a, b in corners)
        body += f'<polygon id="s-{branch}" points="{points}"/>'
    return Markup(f"<defs>{body}</defs>")


def _polygon(corners: int, outer: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Return a regular polygon, or a star if an inner radius is given."""
    count = corners * (2 if inner else 1)
    out = []
    for index in range(count):
        length = inner if inner and index % 2 else outer
        angle = 2 * math.pi * index / count - math.pi / 2
        out.append((length * math.cos(angle), length * math.sin(angle)))
    return out


def text_width(raw: str) -> float:
    """Return the approximate width of `raw` in the 11 px label font, by the wider of common fonts."""
    return sum(10.0 if char in "mwMW@%" else 4.0 if char in "fijlrt.,:;'|! []()" else 6.8 for char in raw)


def text_box(x: float, y: float, raw: str) -> Box:
    """Return the box of a label that starts at `x` on the baseline `y`."""
    return (x, y - LINE + 3, x + text_width(raw), y + 3)


def overlap(a: Box, b: Box) -> float:
    """Return the area that two boxes share."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def place_labels(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    frame: Box,
    lines: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Return where each label starts (x, baseline y) so that they overlap as little as possible.

    Each label tries places around its point and takes the cheapest: no overlap with other labels,
    points or drawn `lines` (as thin boxes), inside the frame, close. Three rounds let early labels
    give way to later ones.
    """
    dots: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    places = [_candidates(point, label) for point, label in zip(points, labels, strict=True)]
    chosen = [options[0] for options in places]
    crowded = sorted(range(len(points)), key=lambda i: -sum(overlap(_wide(dots[i]), d) for d in dots))
    placed: dict[int, Box] = {}
    for _ in range(3):
        for index in crowded:
            placed.pop(index, None)
            rest = [dot for other, dot in enumerate(dots) if other != index]
            boxes = [text_box(x, y, labels[index]) for x, y in places[index]]
            costs = [
                10 * sum(overlap(box, other) for other in placed.values())
                + sum(overlap(box, dot) for dot in rest)
                + 0.4 * sum(overlap(box, line) for line in lines)
                + 50 * _outside(box, frame)
                + 0.6 * rank
                for rank, box in enumerate(boxes)
            ]
            best = costs.index(min(costs))
            chosen[index], placed[index] = places[index][best], boxes[best]
    return chosen


def _wide(box: Box) -> Box:
    return (box[0] - 40, box[1] - 20, box[2] + 40, box[3] + 20)


def _candidates(point: tuple[float, float], label: str) -> list[tuple[float, float]]:
    """Places for a label, nearest first: right, left, above, below, then further out."""
    x, y = point
    width = text_width(label)
    out = []
    for gap in (8.0, 18.0, 30.0, 44.0, 60.0):
        drop = gap if gap > 8 else 4.0
        out += [(x + gap, y + 4), (x - gap - width, y + 4)]
        out += [(x + gap * 0.7, y - drop), (x + gap * 0.7, y + drop + 8)]
        out += [(x - gap * 0.7 - width, y - drop), (x - gap * 0.7 - width, y + drop + 8)]
        out += [(x - width / 2, y - gap - 1), (x - width / 2, y + gap + 9)]
    return out


def _outside(box: Box, frame: Box) -> float:
    return (
        max(0.0, frame[0] - box[0])
        + max(0.0, box[2] - frame[2])
        + max(0.0, frame[1] - box[1])
        + max(0.0, box[3] - frame[3])
    )
