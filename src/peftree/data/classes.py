"""Classes of rows: their names in order, and what looks wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from peftree.errors import DataError, did_you_mean

MANY = 20  # more classes than this, and than half of the rows, are hardly classes


class Row(Protocol):
    """What is read of a row here: its class, and where it is."""

    @property
    def target(self) -> str:
        """The class's name."""

    @property
    def where(self) -> str:
        """File and line."""


def check_classes(labels: Sequence[str], rows: Sequence[Row], inferred: bool, name: str, warnings: list[str]) -> None:
    """Refuse numbers that are unlikely to be classes, unless the task is set; warn of what else looks wrong."""
    many = len(labels) > max(MANY, len(rows) / 2)
    numbers = [number for label in labels if (number := _finite(label)) is not None]
    if len(numbers) == len(labels) and (many or not all(number.is_integer() for number in numbers)):
        odd = next((label for label in labels if not float(label).is_integer()), labels[0])
        what = f"{name} holds numbers such as {odd}: {len(labels)} different ones in {len(rows)} rows, each a class."
        if inferred:
            raise DataError(
                what,
                f"To predict numbers, set task=text-regression data.columns.score={name}; "
                "if they are classes, set task=text-classification.",
            )
        warnings.append(f"{what} To predict numbers, use the task text-regression")
    elif many:
        warnings.append(f"{name} has {len(labels)} classes in {len(rows)} rows: most have too few to learn from")
    plain: dict[str | float, str] = {}
    for label in labels:
        number = _finite(label)
        first = plain.setdefault(" ".join(label.split()).casefold() if number is None else number, label)
        if first != label:
            how = "only space or case" if number is None else "only how one number is written"
            warnings.append(f"the classes {first!r} and {label!r} differ in {how}; they are two classes")


def _finite(label: str) -> float | None:
    """Return the finite number that a label is; None if it is not one."""
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def classes_of(rows: Iterable[Row], least: int) -> tuple[str, ...]:
    """Return the class names: whole numbers in numerical order, others in alphabetical order."""
    found = {row.target for row in rows}
    if len(found) < least:
        raise DataError(f"All training rows have the label {sorted(found)}.", "Classification needs at least two.")
    numbers = all(name.removeprefix("-").isdecimal() for name in found)
    return tuple(sorted(found, key=(lambda name: (int(name), name)) if numbers else str))


def check_labels(rows: Iterable[Row], labels: Sequence[str], split: str) -> None:
    """Refuse labels that no training row has; DataError names the row."""
    for row in rows:
        if row.target not in labels:
            raise DataError(
                f"{row.where}: {split} has the label {row.target!r}, which no training row has.",
                did_you_mean(row.target, labels, "Labels"),
            )
