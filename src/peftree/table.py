"""A table as plain data, for the page, the terminal, Markdown and LaTeX alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftree import text

Key = float | str | None


@dataclass(frozen=True)
class Cell:
    """A table cell: the figure, a second line that qualifies it, what to sort by, its role."""

    main: str
    sub: str = ""
    key: Key = None
    css: str = ""
    href: str = ""


NOTHING = Cell(text.NONE)


def number(value: float | None, decimals: int = 3, *, signed: bool = False, sub: str = "") -> Cell:
    """Return a cell with a number, a dash for None."""
    return NOTHING if value is None else Cell(text.score(value, decimals, signed=signed), sub, value)


@dataclass(frozen=True)
class Head:
    """A column's heading, what it means, and the modality of the task that it belongs to, if any.

    `own`: the heading is named by the records (a test set, a task), so it is not a term to explain.
    """

    title: str
    meaning: str = ""
    numeric: bool = True
    name: str = ""
    modality: str = ""
    own: bool = False


@dataclass(frozen=True)
class Line:
    """One row; the first cell is its heading. `branch` and `share` are what the page filters by."""

    cells: tuple[Cell, ...]
    branch: str = ""
    share: float | None = None
    css: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table. `css` names its kind; `notes` go under it."""

    anchor: str
    title: str
    caption: str
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = field(default=())
    css: str = "plain"


def budget(share: float | None) -> str:
    """Return the budget class of a share of trainable parameters, as the page filters by it.

    >>> budget(0.0005), budget(0.002), budget(0.01), budget(1.0), budget(None)
    ('up to 0.1 %', '0.1 to 0.5 %', '0.5 to 2 %', 'over 2 %', '')
    """
    if share is None:
        return ""
    return next((name for limit, name in BUDGETS if share <= limit), "")


BUDGETS = ((0.001, "up to 0.1 %"), (0.005, "0.1 to 0.5 %"), (0.02, "0.5 to 2 %"), (float("inf"), "over 2 %"))
