"""Rules from the literature, each with its source; they explain and set values, but do not rank."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from peftree.strict import Strict

RULES = Path(__file__).with_name("rules.yaml")


class _When(Strict):
    """Where a rule applies; empty: everywhere."""

    methods: tuple[str, ...] = ()
    modality: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    rows: tuple[int, int] = (0, 1 << 62)


class Rule(Strict):
    """One rule."""

    rule: str = Field(min_length=1)
    source: str = Field(min_length=1)
    when: _When


@cache
def rules() -> tuple[Rule, ...]:
    """Return all rules."""
    found: list[Any] = yaml.safe_load(RULES.read_text("utf-8"))
    return tuple(Rule.model_validate(item) for item in found)


def apply(methods: Collection[str], modality: str, kind: str, rows: int) -> tuple[Rule, ...]:
    """Return the rules that apply to methods, a kind of task and a number of training rows."""

    def holds(when: _When) -> bool:
        return (
            (not when.methods or bool({*when.methods} & {*methods}))
            and modality in (when.modality or (modality,))
            and kind in (when.kind or (kind,))
            and when.rows[0] <= rows <= when.rows[1]
        )

    return tuple(rule for rule in rules() if holds(rule.when))
