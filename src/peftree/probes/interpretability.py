"""Interpretability: what the adapter changed in weights and hidden states, where it matters, how it routes."""

from __future__ import annotations

from typing import Any

from pydantic import Field, FiniteFloat

from peftree.evaluate.subject import Number, Result, Subject, Unmeasured, some
from peftree.probes import Probe, Scale, Sheet
from peftree.table import NOTHING, Cell, Head, number
from peftree.text import NONE, clean, percent, score


class Update(Result):
    """Weight updates: medians over matrices, and mean numbers of intruders by threshold; see `evaluate.spectra`."""

    relative_update: FiniteFloat | None = None
    effective_rank: FiniteFloat | None = None
    stable_rank: FiniteFloat | None = None
    intruders: dict[str, FiniteFloat] | None = None


class Routing(Result):
    """How a mixture's routers spread tokens over experts; see `evaluate.observe.routing`."""

    load: tuple[FiniteFloat, ...] = ()
    balance: FiniteFloat | None = None
    entropy: FiniteFloat | None = None
    confidence: FiniteFloat | None = None
    experts: Number | None = None
    routers: Number | None = None


class Found(Update):
    """What an adapter changed: what `evaluate.spectra` finds, and `evaluate.observe`."""

    spectra: Unmeasured | None = None  # where the method changes no weight matrix
    matrices: Number | None = None
    of: Number | None = None
    top: Number | None = None
    by_role: dict[str, Update] | None = None
    by_layer: dict[str, Update] | None = None
    cka: tuple[FiniteFloat, ...] | Unmeasured | None = None  # after each layer, adapter on and off; 1 is unchanged
    knockout: dict[str, FiniteFloat] | Unmeasured | None = None
    knockout_score: FiniteFloat | None = None
    knockout_items: Number | None = None
    knockout_of: Number | None = None
    routing: Routing | None = None
    gates: dict[str, dict[str, Number]] | None = None


def _cells(found: Found, scale: Scale) -> list[Cell]:
    intruders = ", ".join(f"{clean(eps)}: {some:.3g}" for eps, some in sorted((found.intruders or {}).items()))
    cka = found.cka if isinstance(found.cka, tuple) else ()
    lowest = min(cka, default=None)
    where = "" if lowest is None else f"layer {cka.index(lowest) + 1}"
    knock = routing = NOTHING
    if isinstance(found.knockout, dict) and found.knockout:
        layer, change = max(found.knockout.items(), key=lambda item: abs(item[1]))
        knock = Cell(clean(layer), score(change, scale.decimals, signed=True), layer)
    if found.routing and found.routing.load:
        spread = "" if found.routing.entropy is None else f"entropy {found.routing.entropy:.2f}"
        routing = Cell(percent(max(found.routing.load)), spread, max(found.routing.load))
    ranks = (number(value, 1) for value in (found.effective_rank, found.stable_rank))
    update = number(found.relative_update, 4)
    return [update, *ranks, Cell(intruders or NONE), number(lowest, 3, sub=where), knock, routing]


_HEADS = (
    Head("Relative update", "|W' - W| / |W|, median over matrices."),
    Head("Effective rank", "exp(H) of the update's normalised singular values, median."),
    Head("Stable rank", "Squared Frobenius over squared spectral norm of the update, median."),
    Head("Intruders", "Singular vectors of W' whose largest cosine with any of W's is below the threshold, mean number "
         "a matrix.", numeric=False),
    Head("CKA, lowest", "Lowest likeness of a layer's states, adapter on and off; 1 is unchanged."),
    Head("Knock-out", "The layer without whose deltas the score changes most, and by how much.", numeric=False),
    Head("Routing", "Share of tokens of the busiest expert, and entropy over that of an even spread.", numeric=False),
)  # fmt: skip


class Interpretability(Probe):
    """What did the adapter change, and where?"""

    name = "interpretability"
    result = Found
    needs_rows = False  # the weights alone tell something
    order = 5
    sheet = Sheet(
        "Inside the model", "Means over the seeds. A method that changes no weight matrix has no update.", _HEADS,
        _cells, "inside",
    )  # fmt: skip
    matrices: int = Field(12, ge=1, description="weight matrices whose update is decomposed")
    top: int = Field(10, ge=1, description="leading singular vectors among which intruders are counted")
    rows: int = Field(64, ge=2, description="rows for the comparison of hidden states and for the routing load")
    layers: int = Field(6, ge=1, description="layers to knock out, evenly spread")
    limit: int = Field(32, ge=1, description="rows scored for each layer knocked out")

    def measure(self, subject: Subject) -> Result:
        """Look inside an adapter."""
        from peftree.evaluate.hidden import likeness
        from peftree.evaluate.observe import gates, knockout, routing
        from peftree.evaluate.spectra import spectra

        found = spectra(subject.adapter, self.matrices, self.top)
        out: dict[str, Any] = {"spectra": found} if isinstance(found, Unmeasured) else found
        rows = [row for _, row in some(subject.rows, self.rows)]
        out["cka"] = likeness(subject, rows)
        out |= knockout(subject, self.layers, self.limit)
        for name, look in (("routing", routing), ("gates", gates)):
            seen = look(subject, rows) if rows else None
            out[name] = None if isinstance(seen, Unmeasured) else seen
        return Found.model_validate(out)
