"""Figures of pages as SVG files: styles and symbols inside, and a plot of lines over a logarithmic axis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from peftree.report import plots, svg
from peftree.report.svg import num

Point = tuple[float, float]


def svg_file(drawn: str) -> str:
    """Return a figure as a standalone SVG file, with styles and symbols inside."""
    size = re.search(r'viewBox="0 0 (\S+) (\S+)"', drawn)
    assert size is not None
    style = Path(svg.__file__).with_name("figure.css").read_text("utf-8")
    fonts = 'font-family="system-ui, Segoe UI, Liberation Sans, Arial, sans-serif"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[1]}" height="{size[2]}" {fonts}'
    top, title, rest = str(drawn).removeprefix("<svg").partition("</title>")
    return f"{start}{top}{title}<style>{style}</style>{svg.symbols()}{rest}\n"


def lines(title: str, across: str, up: str, drawn: Sequence[tuple[str, str, Sequence[Point]]]) -> str:
    """Return a plot of lines (name, branch whose colour and symbol it takes, points) over a logarithmic axis."""
    points = [p for _, _, some in drawn for p in some]
    x = svg.scale_over([p[0] for p in points], plots.LEFT, plots.WIDTH - plots.RIGHT, log=True)
    y = svg.scale_over([1.0, *(p[1] for p in points)], plots.HEIGHT - plots.BOTTOM, plots.TOP)
    body = plots.axes(x, y, lambda value: f"{value:,.0f}", across, up)
    ends = []
    for _, branch, some in drawn:
        placed = [(x(a), y(b)) for a, b in some]
        ends.append(placed[len(placed) // 2])
        body.append(f'<path class="line b-{branch}" d="M{" ".join(f"{num(a)} {num(b)}" for a, b in placed)}"/>')
        body += [svg.marker(branch, a, b) for a, b in placed]
    body += plots.labels_at(ends, [name for name, _, _ in drawn], ends)
    told = "; ".join(f"{name}: {', '.join(f'{b:.2f} at {a:g}' for a, b in some)}" for name, _, some in drawn)
    return svg_file(svg.document(plots.WIDTH, plots.HEIGHT, title, told, body))
