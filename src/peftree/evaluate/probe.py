"""Probes: what a finished run is measured on beyond quality. Each gives plain JSON and leaves the model as it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import JsonValue

from peftree.adapter import active
from peftree.errors import AdapterError
from peftree.evaluate.calibration import calibration
from peftree.evaluate.interpret import interpretability
from peftree.evaluate.latency import latency
from peftree.evaluate.retention import retention
from peftree.evaluate.robustness import corruptions
from peftree.evaluate.settings import SETTINGS, check
from peftree.evaluate.subject import Result, Row, Subject, not_measured
from peftree.evaluate.textnoise import noise

__all__ = ["PROBES", "SETTINGS", "Row", "Subject", "check", "run_probes"]

PROBES: dict[str, Callable[[Subject, Any], Result]] = {
    "calibration": calibration,
    "noise": noise,
    "corruptions": corruptions,
    "retention": retention,
    "interpretability": interpretability,
    "latency": latency,
}
"""Name -> probe, called with the subject and its settings, which `SETTINGS` describes under the same name."""


def run_probes(subject: Subject, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, JsonValue]]:
    """Run the probes `wanted` on a finished run.

    Args:
        subject: the run, its adapter on and not merged.
        wanted: settings by probe, `{"calibration": {}, "noise": {"limit": 20}}`; see `settings.check`.

    Returns:
        The result of every probe wanted, plain JSON; `{"not measured": reason}` where it cannot be done.

    Raises:
        ConfigError: a probe or setting is unknown or out of range; nothing was run then.
        AdapterError: the adapter is off or merged, or another one is on.
        ValueError: a figure is not finite.
    """
    checked = check(wanted)
    if active(subject.model) != (subject.adapter.name,):
        raise AdapterError(
            f"Not '{subject.adapter.name}' alone is on, but {list(active(subject.model))}.",
            "Unmerge, and switch(model, name) before probing.",
        )
    out: dict[str, dict[str, JsonValue]] = {}
    for name, settings in checked.items():
        if settings.tasks and subject.task not in settings.tasks:
            out[name] = not_measured(f"The probe is for {', '.join(settings.tasks)}, not {subject.task}.")
        else:
            out[name] = json.loads(json.dumps(PROBES[name](subject, settings), allow_nan=False))
    return out
