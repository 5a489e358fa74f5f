"""Which cases of a test the quick suite runs: the first few; the rest are slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick(cases: Iterable[Any], first: int = 1) -> list[Any]:
    """Return what `parametrize` takes: the first cases as they are, the others marked slow."""
    out: list[Any] = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        out.append(case if number < first else pytest.param(*values, marks=pytest.mark.slow))
    return out
