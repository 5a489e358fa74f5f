"""The candidates: every method at its paper's defaults, LoRA on all linear layers, some ranks, measured settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peftree import registry
from peftree.advise.table import Table, key

VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora", {"sites": "linear"}),
    ("lora", {"sites": "linear", "r": 16, "alpha": 32.0}),
    ("lora", {"sites": "linear", "r": 64, "alpha": 128.0}),
    ("lora", {"r": 16, "alpha": 32.0}),
)


@dataclass(frozen=True)
class Candidate:
    """A method with the fields that differ from its defaults."""

    method: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name for people: `lora r=16`."""
        return key(self.method, self.fields)

    @property
    def slug(self) -> str:
        """Its name for files."""
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in self.label)


def candidates(tables: Iterable[Table]) -> list[Candidate]:
    """Return all candidates, each once: those of the registry, variants of LoRA, and measured settings."""
    found = [Candidate(name) for name in registry.methods()]
    found += [Candidate(name, fields) for name, fields in VARIANTS]
    found += [
        Candidate(row.method, dict(row.fields))
        for table in tables
        for row in table.results
        if row.fields and row.relative is not None and row.method in registry.methods()
    ]
    return list({c.label: c for c in found}.values())
