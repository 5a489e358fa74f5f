"""Models of other libraries, measured as the classes of transformers are: built as the tests build them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from tools.models.measure import Subject, attention, cell, has_attention, has_linear, lora, quiet

HERE = Path(__file__).parents[2] / "tests"
CELLS = ("linear", "attention", "named", "merge")


def measured() -> list[dict[str, Any]]:
    """Return a row for each model: its name, size, and a text for each cell; `sites` are those of the cell `named`."""
    sys.path.append(str(HERE))
    foreign = importlib.import_module("foreign")

    rows = []
    with quiet():
        for name, sites in foreign.SITES.items():
            model, run = foreign.build(name)
            subject, maps = Subject(model, run), has_linear(model)
            row = {"name": name, "parameters": sum(p.numel() for p in model.parameters()), "sites": sites}
            row["linear"] = cell(lambda: lora(subject, "linear")) if maps else "-"  # noqa: B023
            row["attention"] = cell(lambda: attention(subject)) if has_attention(model) else "-"  # noqa: B023
            row["named"] = cell(lambda: lora(subject, sites))  # noqa: B023
            row["merge"] = cell(lambda: lora(subject, sites, merging=True))  # noqa: B023
            rows.append(row)
    return rows
