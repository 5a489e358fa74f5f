"""Shows a plan: a bar of what the peak is made of, what fits, ways to fit the budget; in a terminal or as a page."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from peftree.errors import ConfigError
from peftree.plan import fit
from peftree.plan.calibrate import Calibration, calibrate
from peftree.plan.estimate import form_of, model_of, plan, settled
from peftree.plan.question import Request
from peftree.plan.result import Plan
from peftree.plan.rows import fed_by
from peftree.resolver import located
from peftree.tasks.loading import tokenizer

GIB, MIB = 2**30, 2**20
COLOURS = {
    "weights": "#4477aa", "adapter": "#66ccee", "gradients": "#ee6677", "optimizer": "#aa3377",
    "activations": "#ccbb44", "logits": "#228833", "temporaries": "#999999",
}  # fmt: skip
WIDTH = 64


def amount(size: float) -> str:
    """Return bytes in words: 14.3 GiB, 812 MiB."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / MIB:.0f} MiB" if size >= 10 * MIB else f"{size / 1024:.0f} KiB"


@dataclass(frozen=True)
class Shown:
    """A plan, with what fits its budget.

    Attributes:
        plan: the plan.
        batch, length: the largest batch and length that fit; None without a budget.
        ways: the cheapest ways to fit the budget, if the setting does not fit.
        time: the time of real steps, if asked for.
    """

    plan: Plan
    batch: int | None = None
    length: int | None = None
    ways: tuple[fit.Way, ...] = ()
    time: Calibration | None = None

    @classmethod
    def of(cls, asked: Request, timed: bool = False, say: Callable[[str], object] = lambda line: None) -> Shown:
        """Plan a request; with a budget, find what fits and ways to fit; `say` is called with what is being done.

        Raises:
            ConfigError: the budget is less than the weights alone.
        """
        made = plan(asked)
        time = calibrate(asked, made, say) if timed else None
        if not asked.memory:
            return cls(made, time=time)
        weights = [made.parts.get("weights", 0)]
        if form_of(asked) == "none":
            weights.append(plan(asked.model_copy(update={"quantize": "nf4"})).parts.get("weights", 0))
        least = min(weights)
        if asked.memory < least and asked.shard != "fsdp":
            raise ConfigError(
                f"The weights take {amount(least)} even in 4 bits; the budget is {amount(asked.memory)}.",
                "Split them over devices (devices=4 shard=fsdp), or choose a smaller model.",
            )
        say("looking for the largest batch and length")
        batch, length = fit.largest(asked, asked.memory), fit.largest(asked, asked.memory, "max_length")
        say("looking for ways to fit the budget")
        return cls(made, batch, length, tuple(fit.ways(asked, asked.memory)), time)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        ways = [
            {"what": w.what, "changes": w.changes, "price": w.price, "expected": w.plan.expected} for w in self.ways
        ]
        fits = self.plan.fits(self.plan.request.memory) if self.plan.request.memory else None
        time = vars(self.time) if self.time else None
        return self.plan.to_dict() | {
            "fits": fits, "largest_batch": self.batch, "largest_length": self.length, "ways": ways, "time": time,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """Yield the output, line by line."""
        made, asked = self.plan, self.plan.request
        share = made.trainable / made.total if made.total else 0
        counts = f"{made.sites} sites, {made.trainable:,} trainable parameters ({share:.3%})"
        yield f"{made.model}, {asked.name}: {counts}"
        span = f"{amount(made.low)} to {amount(made.high)}"
        yield f"peak in the {made.phase} phase: {amount(made.expected)} expected ({span})"
        if made.operations:
            yield f"{made.operations / 1e12:.3g} TFLOP per step (operations do not determine its time)"
        if self.time:
            yield self.time.line()
        if asked.memory:
            word = "fits into" if made.fits(asked.memory) else "does not fit into"
            yield f"{word} {amount(asked.memory)}; largest batch {self.batch:,}, largest length {self.length:,}"
        for number, way in enumerate(self.ways, 1):
            yield f"way {number}: {way.what} -> {amount(way.plan.expected)} (price: {way.price})"
        if asked.memory and not made.fits(asked.memory) and not self.ways:
            yield "no combination of up to three changes fits"
        yield from (f"note: {note}" for note in made.notes)

    def render(self) -> Any:
        """Return it for a rich console."""
        from rich.console import Group
        from rich.text import Text

        total = sum(self.plan.parts.values()) or 1
        bar, legend = Text(), Text()
        for name, size in self.plan.parts.items():
            bar.append("\u2588" * max(round(WIDTH * size / total), size > total / (2 * WIDTH)), style=COLOURS[name])
            legend.append("\u2588 ", style=COLOURS[name])
            legend.append(f"{name} {amount(size)}  ")
        return Group(bar, legend, *(Text(line) for line in self.lines()))

    def page(self) -> str:
        """Return one HTML page, which requests nothing from anywhere."""
        from jinja2 import Environment

        text = (Path(__file__).with_name("page.html.j2")).read_text("utf-8")
        total = sum(self.plan.parts.values()) or 1
        parts = [(n, amount(s), 100 * s / total, COLOURS[n]) for n, s in self.plan.parts.items()]
        phases = [(n, amount(s)) for n, s in self.plan.phases.items()]
        lines = list(self.lines())
        title = html.unescape(f"Memory plan: {self.plan.model}, {self.plan.request.name}")
        return Environment(autoescape=True).from_string(text).render(
            title=title, parts=parts, phases=phases, lines=lines,
            settings={k: v for k, v in self.plan.request.model_dump(mode="json").items() if k != "model"},
        )  # fmt: skip


def with_data(asked: Request) -> tuple[Request, str]:
    """Return the request with what its rows say (task, classes, and the length of the longest), and a line about it.

    The model folder's tokenizer counts tokens; without one, four characters count as a token. Rows are cut as
    in training.

    Raises:
        ConfigError: the data hold only images, of unknown size.
        DataError: a file does not parse.
    """
    from peftree.catalogue import task_facts
    from peftree.data.thinning import rows_of

    assert asked.data is not None
    data = rows_of(asked)
    about, rows = task_facts(data.task), (*data.train, *data.valid, *data.test)
    source = asked.data.train
    asked = asked.model_copy(update={"task": data.task, "labels": max(len(data.labels), 1)})
    model_of(asked)  # a model that has no such task is told of first
    if about.modality == "vision":
        fed = fed_by(asked, data) if Path(located(asked.model)).expanduser().is_dir() else {}
        return asked.model_copy(update=fed), f"{source}: {len(rows):,} images"
    words = _words(located(asked.model))
    texts = [about.text(row.source, row.target) for row in rows]
    counted = map(len, words(texts, verbose=False)["input_ids"]) if words else (max(1, len(t) // 4) for t in texts)
    lengths = sorted(counted)
    limit = settled(asked).length
    if words and asked.max_length is None:
        limit = min(limit, words.model_max_length)
    most, middle = min(lengths[-1], limit), lengths[len(lengths) // 2]
    cut = f" (max_length={limit} cuts the longest)" if most < lengths[-1] else ""
    said = f"{source}: {len(lengths):,} rows of {middle} tokens (median), at most {lengths[-1]}"
    fed = fed_by(asked.model_copy(update={"max_length": limit}), data) if words else {"max_length": most}
    if words and about.modality == "vision-language":  # texts alone were counted
        said, cut = f"{source}: {len(lengths):,} rows of images and texts", ""
    return asked.model_copy(update=fed), f"{said}: planned for {fed.get('max_length', most)}{cut}"


def _words(model: str) -> Any:
    """Return the tokenizer in a model's folder, or None."""
    return tokenizer(model) if (Path(model).expanduser() / "tokenizer.json").is_file() else None


def print_table(asked: Request, as_json: bool) -> None:
    """Print methods x batches x lengths, or of each the one that is named; each row when it is computed."""
    from rich.console import Console
    from rich.live import Live
    from rich.progress import track
    from rich.table import Table

    from peftree import registry

    names = [asked.method.name] if "method" in asked.model_fields_set else sorted(registry.methods())
    batches = (asked.batch_size,) if "batch_size" in asked.model_fields_set else fit.BATCHES
    lengths = _lengths(asked)
    if as_json:
        bar = track(names, "planning", console=Console(stderr=True), transient=True)
        cells = [vars(cell) for name in bar for cell in fit.table(asked, [name], batches, lengths)]
        typer.echo(json.dumps(cells, indent=2))
        return
    title = f"{asked.model}: expected GiB"
    shown = Table(title=title, box=None, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("method", no_wrap=True)
    shown.add_column("trained", justify="right", no_wrap=True)
    for batch, length in ((b, n) for n in lengths for b in batches):
        shown.add_column(f"{batch} x\n{length}", justify="right", no_wrap=True)
    left_out = []
    with Live(shown, console=Console(), refresh_per_second=2, vertical_overflow="visible"):
        for number, name in enumerate(names):
            shown.caption = f"{number} of {len(names)} methods; {name} is next"
            mine = list(fit.table(asked, [name], batches, lengths))
            if mine[0].expected is None:
                left_out.append(name)
            else:
                shown.add_row(name, _short(mine[0].trainable / 1e6) + "M", *(_cell(c, asked.memory) for c in mine))
        shown.caption = None
    if asked.memory:
        typer.echo(f"x: more than the budget of {amount(asked.memory)}.")
    if left_out:
        typer.echo(f"Not for this model: {', '.join(left_out)}.")


def _lengths(asked: Request) -> tuple[int, ...]:
    from peftree.plan.estimate import positions

    chosen = (asked.max_length,) if asked.max_length else fit.LENGTHS
    most = positions(asked)
    return tuple(n for n in chosen if n <= most) or (min(most, asked.length),)


def _cell(cell: fit.Cell, memory: int) -> str:
    if cell.expected is None:
        return "-"
    value = cell.expected / GIB
    if not memory or cell.expected <= memory:
        return _short(value)
    return f"[dim]{value:.{2 if value < 10 else 1 if value < 100 else 0}f}x[/dim]"  # five characters too


def _short(value: float) -> str:
    """Return a number in five characters, so that nine columns fit into a terminal of 80."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"
