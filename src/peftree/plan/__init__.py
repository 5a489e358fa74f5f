"""Memory before anything runs: what a setting takes, from a config alone. Imports no torch until a plan is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftree.plan.request import Request, parse_bytes, request

if TYPE_CHECKING:
    from peftree.plan.result import Plan as Plan

__all__ = ["Plan", "Request", "largest", "parse_bytes", "plan", "request", "table", "ways"]


def plan(asked: Request) -> Plan:
    """Return what a setting takes; see `peftree.plan.estimate.plan`."""
    from peftree.plan.estimate import plan as made

    return made(asked)


def __getattr__(name: str) -> Any:
    if name == "Plan":
        from peftree.plan.result import Plan

        return Plan
    if name in ("largest", "table", "ways"):
        from peftree.plan import fit

        return getattr(fit, name)
    raise AttributeError(f"module 'peftree.plan' has no attribute '{name}'")
