"""The command `peftree advise`: flags in, calls out; imports no torch before it runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftree.errors import ConfigError

if TYPE_CHECKING:
    from peftree.advise.advice import Advice
    from peftree.advise.probe import Probed

_SECONDS = {"s": 1, "min": 60, "h": 3600}


def seconds(text: str) -> float:
    """Return the seconds that `5min`, `90s` or `1.5h` means.

    >>> seconds("5min"), seconds("1.5 h")
    (300.0, 5400.0)

    Raises:
        ConfigError: the text is not a duration.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    if found is None or not float(found[1]):
        raise ConfigError(f"'{text}' is not a duration.", "Write it as 90s, 5min or 1.5h.")
    return float(found[1]) * _SECONDS[found[2]]


def advise(
    first: Annotated[str, typer.Argument(help="run.yaml, a model (folder with config.json, or a name), or key=value.")],
    words: Annotated[list[str] | None, typer.Argument(help="key=value: data=FILE max_length=512 device=cpu.")] = None,
    memory: Annotated[str, typer.Option(help="Memory of one device: 24GB, 24GiB, 800MB.")] = "",
    goal: Annotated[str, typer.Option(help="quality (the default), memory, speed, retention or serving.")] = "",
    write: Annotated[Path | None, typer.Option(help="Write a run.yaml for each recommendation here.")] = None,
    probe: Annotated[str, typer.Option(help="Time to spend on trying candidates on the data: 5min.")] = "",
    out: Annotated[Path, typer.Option(help="Where --probe keeps its runs; the same command continues.")] = Path(
        "probe"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress output.")] = False,
) -> None:
    """Recommend methods for a model, data and a memory budget, with evidence and doubts; write a run.yaml for each."""
    from peftree.plan import parse_bytes
    from peftree.settings import read_settings, spoken

    spend = seconds(probe) if probe else 0.0
    more: dict[str, Any] = {"memory": parse_bytes(memory)} if memory else {}
    more |= {"goal": goal} if goal else {}
    if write is not None and write.exists() and not write.is_dir():
        raise ConfigError(f"--write {write} is not a folder.", "Name a folder; it may be new.")
    from peftree.advise.advice import Asked
    from peftree.advise.advice import advise as give

    path, rest, named = spoken(first, words or [], Asked)
    asked = read_settings(Asked, path, rest, **named, **more)
    if not asked.memory:
        raise ConfigError("Advice needs a budget.", "Add --memory 24GB.")
    silent = quiet or as_json
    with _progress(silent) as told:
        advice = give(asked, told)
    probed = None
    if spend:
        from peftree.advise.probe import probe as measure

        with _progress(silent) as told:
            probed = measure(asked, advice, spend, out, told)
    written = _write(write, advice, probed) if write is not None else []
    if as_json:
        found = advice.to_dict() | {"written": written, "probe": asdict(probed) if probed else None}
        typer.echo(json.dumps(found, indent=2, default=str))
    else:
        _print(advice, probed, written)


@contextmanager
def _progress(silent: bool) -> Iterator[Callable[[str], None]]:
    """Show a line that disappears at the end, with the elapsed time; yield a function that changes its text."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=silent) as bar:
        shown = bar.add_task("")
        yield lambda words: bar.update(shown, description=words)


def _write(folder: Path, advice: Advice, probed: Probed | None) -> list[str]:
    from peftree.advise.settings import write_run

    rows = [(r.judged.candidate, r.run, r.why) for r in advice.recommended]
    if probed is not None:
        rows = [(t.candidate, t.run, (t.text,)) for t in probed.tried]
    return [str(write_run(folder, run, candidate, why)) for candidate, run, why in rows]


def _print(advice: Advice, probed: Probed | None, written: list[str]) -> None:
    from rich.console import Console

    from peftree.advise import show

    console = Console()
    console.print(show.render(advice), soft_wrap=False)
    if probed is not None:
        console.print(show.render_probe(probed))
    for path in written:
        typer.echo(f"Wrote {path}; next: peftree train {path}")
