"""Interpretability: what the adapter changed in weights and hidden states, where it matters, how it routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftree.adapter import disabled
from peftree.evaluate.hidden import body, by_layer, cka
from peftree.evaluate.observe import gates, knockout, routing
from peftree.evaluate.settings import Interpretability
from peftree.evaluate.spectra import spectra
from peftree.evaluate.subject import Result, Row, Subject, not_measured, some


def interpretability(subject: Subject, settings: Interpretability) -> Result:
    """Look into an adapter.

    Returns:
        What `spectra` finds (or `spectra`: not measured, for methods that change no weight matrix); `cka`: linear CKA
        of the states after each layer of the body, adapter on and off, over tokens, 1 meaning unchanged; what
        `knockout` finds; `routing` and `gates`, where the method has any.
    """
    found = spectra(subject.adapter, settings.matrices, settings.top)
    out: Result = {"spectra": found} if "not measured" in found else found
    rows = [row for _, row in some(subject.rows, settings.rows)]
    if not rows:
        return out | not_measured("There are no test rows; the weights alone were looked at.")
    out["cka"] = _likeness(subject, rows)
    out |= knockout(subject, settings.layers, settings.limit)
    for name, look in (("routing", routing), ("gates", gates)):
        seen = look(subject, rows)
        if "not measured" not in seen:
            out[name] = seen
    return out


def _likeness(subject: Subject, rows: Sequence[Row]) -> Any:
    if body(subject) is None:
        return not_measured(f"{type(subject.model).__name__} has no body with hidden states to read.")
    with disabled(subject.model):
        before = by_layer(subject, rows)
    after = by_layer(subject, rows)
    if any(x.shape != y.shape for x, y in zip(before, after, strict=True)):
        return not_measured("The adapter leaves its own tokens in the states, so tokens have no counterparts.")
    return [cka(x, y) for x, y in zip(before, after, strict=True)]
