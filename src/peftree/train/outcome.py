"""What a run says about its scores, compared with the model without the adapter and with one answer for all rows."""

from __future__ import annotations

from typing import Any

from peftree.evaluate.quality import Scores
from peftree.runs.record import Run


def scored(scores: Scores, base: Scores | None, split: str, known: bool) -> dict[str, Any]:
    """Return scores under the names of a run's result; `known`: the base's are those of an earlier run."""
    return {
        "metric": scores.metric, "higher_is_better": scores.higher_is_better, "aggregate": scores.aggregate,
        "split": split, "score": scores.score, "values": dict(scores.values), "items": scores.items,
        "base_score": base.score if base else None, "base_values": dict(base.values) if base else {},
        "base_items": base.items if base else (), "base_known": known,
        "constant_score": scores.constant,
        "no_better_than": scores.unbeaten(base.score if base else None),
    }  # fmt: skip


def last_lines(result: Run) -> list[str]:
    """Return the lines printed at the end of a run with this `result`."""
    beside = {"without the adapter": result.base_score, "one answer for all rows": result.constant_score}
    known = ", ".join(f"{who} {score:.4g}" for who, score in beside.items() if score is not None)
    lines = [
        f"{result.metric} {result.score:.4g}{f' ({known})' if known else ''} on {len(result.items)} {result.split} "
        f"rows; {result.steps} steps in {result.train_seconds:.1f} s; adapter in {result.output}/adapter"
    ]
    if result.no_better_than:
        lines.append(f"note: this is no better than {result.no_better_than}: nothing shows that it learned")
    return lines
