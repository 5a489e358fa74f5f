"""One line of progress: what is being worked on, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def line(console: Console) -> Iterator[Callable[[str], None]]:
    """Show a line that disappears at the end; yield a function that changes its text."""
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        shown = bar.add_task("")
        yield lambda words: bar.update(shown, description=words)
