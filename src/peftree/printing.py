"""What commands print: JSON, or a plain table. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftree.errors import GIVE_UP, TRY_AGAIN, USAGE

if TYPE_CHECKING:
    from rich.table import Table

EXITS = {
    0: "done",
    1: "a check failed, or an error of the program itself (a traceback)",
    USAGE: "the command, a setting or a file is wrong",
    GIVE_UP: "give up: bad data, or a run that diverged or would fail silently",
    TRY_AGAIN: "try again: no space, or the folder is in use",
    130: "interrupted by Ctrl-C; resume continues",
    143: "ended by SIGTERM; resume continues",
}  # exit codes of every command; docs/exit-codes.md says more
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def emit(value: Any, as_json: bool, shown: Table | None = None) -> None:
    """Print `value` as JSON, or the table."""
    if as_json:
        typer.echo(json.dumps(value, indent=2, default=str))
    elif shown is not None:
        from rich.console import Console

        Console().print(shown)


def tabled(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a plain table; numbers are set flush right."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    for index, name in enumerate(columns):
        number = bool(rows) and isinstance(rows[0][index], int | float) and not isinstance(rows[0][index], bool)
        made.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=not index)
    for row in rows:
        made.add_row(*(escape(_cell(value)) for value in row))
    return made


def short(value: Any) -> Any:
    """Return a number with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else value


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in text.split("\n"))
