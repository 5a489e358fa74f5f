"""Memory before anything runs: what a setting takes, from a config alone. Imports nothing until used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftree.plan.estimate import plan as plan
    from peftree.plan.fit import largest as largest
    from peftree.plan.fit import table as table
    from peftree.plan.fit import ways as ways
    from peftree.plan.question import Request as Request
    from peftree.plan.question import parse_bytes as parse_bytes
    from peftree.plan.question import request as request
    from peftree.plan.result import Plan as Plan

_HOMES = {
    "estimate": ("plan",), "fit": ("largest", "table", "ways"), "result": ("Plan",),
    "question": ("Request", "parse_bytes", "request"),
}  # fmt: skip
__all__ = ["Plan", "Request", "largest", "parse_bytes", "plan", "request", "table", "ways"]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'peftree.plan' has no attribute '{name}'")
    return getattr(importlib.import_module(f"peftree.plan.{home}"), name)
