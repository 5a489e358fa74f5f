"""Rules from the literature, each with its source; they explain and set values, but do not rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

RULES = Path(__file__).with_name("rules.yaml")


class _When(BaseModel):
    """Where a rule applies; empty: everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    methods: tuple[str, ...] = ()
    modality: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    rows: tuple[int, int] = (0, 1 << 62)


class Rule(BaseModel):
    """One rule."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rule: str = Field(min_length=1)
    source: str = Field(min_length=1)
    when: _When


@dataclass(frozen=True)
class Case:
    """The case that rules are matched against."""

    methods: tuple[str, ...]
    modality: str
    kind: str
    rows: int


@cache
def rules() -> tuple[Rule, ...]:
    """Return all rules."""
    found: list[Any] = yaml.safe_load(RULES.read_text("utf-8"))
    return tuple(Rule.model_validate(item) for item in found)


def apply(case: Case) -> list[Rule]:
    """Return the rules that apply to a case."""
    return [r for r in rules() if _holds(r.when, case)]


def _holds(when: _When, case: Case) -> bool:
    return (
        (not when.methods or bool(set(when.methods) & set(case.methods)))
        and (not when.modality or case.modality in when.modality)
        and (not when.kind or case.kind in when.kind)
        and when.rows[0] <= case.rows <= when.rows[1]
    )
