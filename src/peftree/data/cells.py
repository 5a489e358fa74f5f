"""Cells of a row as text: what is missing, what is a number, and what cannot be read."""

from __future__ import annotations

import math
from typing import Any

from peftree.data.picture import FILES, images_in
from peftree.errors import DataError

# What tables hold where a label or score is missing; as a text each is itself.
MISSING = {"nan", "-nan", "NaN", "None", "null", "NULL", "<NA>", "NA", "N/A", "n/a", "#N/A", "NaT"}


def cell(our: str, value: Any, name: str, where: str) -> str:
    """Return a cell of our column `our` as its exact text, or its one image; empty if it is missing."""
    lacks = value is None or (isinstance(value, float) and math.isnan(value))
    if lacks or (our in ("label", "score") and isinstance(value, str) and value.strip() in MISSING):
        return ""
    if our in FILES and not isinstance(value, str):
        found = images_in(value, name, where)
        if len(found) > 1:
            raise DataError(f"{where}: {name} holds {len(found)} images, not one.", "Set task=image-text-to-text.")
        return found[0] if found else ""
    if our == "score":
        return _number(value, name, where)
    if isinstance(value, float) and value.is_integer() and our == "label":
        value = int(value)  # a column of whole numbers with a gap is one of fractions in Parquet
    if isinstance(value, str | bool | int | float):
        text = str(value)
        if any("\ud800" <= sign <= "\udfff" for sign in text):  # JSON can say it, no tokenizer reads it
            raise DataError(f"{where}: {name} holds half of a surrogate pair, {text!r:.80}.", "Write it as UTF-8 text.")
        return text
    fix = "Labels are classes: names or whole numbers." if our == "label" else f"Write {our} as one string."
    raise DataError(f"{where}: {name} is {str(value)[:200]}, not text.", fix)


def _number(value: Any, name: str, where: str) -> str:
    """Return a cell that holds a finite number, as text that `float` reads."""
    if isinstance(value, str) and not value.strip():
        return ""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {name} is {value!r}, not a finite number.", "Scores are numbers such as 2.5 or -1.")
    return repr(number)
