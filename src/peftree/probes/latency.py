"""Latency: time of a forward pass with the adapter, without it, and with it merged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, FiniteFloat

from peftree.evaluate.subject import Number, Result, Subject, inputs
from peftree.probes import Probe, Scale, Sheet
from peftree.table import NOTHING, Cell, Head


class Found(Result):
    """Median milliseconds per row, and the median ratio to the same round with the adapter off.

    `batch`: the same for a batch of `rows`; `clock`: `thread` (processor time of the one thread that computes)
    or `wall`. Methods that cannot be folded into the weights have no merged figures.
    """

    unit: Literal["ms"] = "ms"
    off: FiniteFloat
    on: FiniteFloat
    merged: FiniteFloat | None = None
    on_ratio: FiniteFloat | None = None
    merged_ratio: FiniteFloat | None = None
    batch: dict[str, Number] | None = None
    rounds: Number | None = None
    threads: Number | None = None
    clock: str | None = None
    why_not_merged: str | None = None


def _cells(found: Found, scale: Scale) -> list[Cell]:
    cells = [Cell(f"{found.off:.3g}", "", found.off)]
    for value in (found.on, found.merged):
        cells.append(NOTHING if value is None else Cell(f"{value:.3g}", f"{value / found.off:.2f} x off", value))
    return cells


class Latency(Probe):
    """How long does a forward pass take, with the adapter, without it, and with it merged?"""

    name = "latency"
    result = Found
    order = 0
    timed = True
    sheet = Sheet(
        "Latency",
        "ms for a forward pass of one row: medians, averaged over the seeds.",
        (Head("Off"), Head("On"), Head("Merged", "After folding into the weights, where the method allows it.")),
        _cells,
    )
    batch: int = Field(8, ge=1, description="rows of the larger batch")
    rounds: int = Field(9, ge=3, description="most rounds")
    seconds: float = Field(15.0, ge=0, description="time after which no new round begins; at least three are run")

    def measure(self, subject: Subject) -> Result:
        """Time the first row and the first batch of the test rows, see `evaluate.latency.timed`."""
        from peftree.evaluate.latency import timed

        one, many = (inputs(next(iter(subject.batches(subject.rows[:n])))) for n in (1, self.batch))
        return Found.model_validate(timed(subject.model, one, many, self.rounds, self.seconds))
