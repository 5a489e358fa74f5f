"""What a candidate takes, and the settings with which it fits the budget: the planner is asked, nothing is guessed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from peftree.advise.profile import DataProfile, ModelProfile
from peftree.errors import ConfigError
from peftree.plan import Plan, Request, largest, plan

ROWS = 16  # of an optimizer step, as a run has by default; a smaller batch is made up for by accumulation
DEFAULT_LENGTH = 256
# What is given up first: nothing, rows at a time, then activations.
LADDER = ((4, False), (ROWS, True), (4, True))
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Setting:
    """How the model is trained, whatever the method.

    Attributes:
        length: tokens of a row; image: pixels of a side, 0 without images.
        dtype: of the base.
        batch: rows wanted at a time.
        labels: classes, 0 for none.
    """

    length: int
    dtype: Dtype
    batch: int = ROWS
    labels: int = 0
    device: Literal["cpu", "cuda"] = "cuda"
    image: int = 0


@dataclass(frozen=True)
class Cost:
    """What a candidate takes.

    Attributes:
        plan: of the settings that fit, or else of those that take least.
        fits: whether that is within the budget.
        batch, accumulation, checkpointing: of these settings.
        largest: rows at a time that still fit; None: not asked.
    """

    plan: Plan
    fits: bool
    batch: int
    accumulation: int
    checkpointing: bool
    largest: int | None = None


def setting(
    model: ModelProfile, data: DataProfile, budget: int, *, length: int = 0, batch: int = 0,
    device: Literal["cpu", "cuda"] = "cuda",
) -> Setting:  # fmt: skip
    """Choose length and precision for a model, data and a budget.

    Raises:
        ConfigError: the budget is below the weights themselves, or the model takes no rows of that length.
    """
    if budget <= model.weights:
        raise ConfigError(
            f"The budget of {size(budget)} is below the weights of {model.source} themselves: "
            f"{model.parameters:,} parameters take {size(model.weights)} in bfloat16.",
            f"Give more than {size(model.weights)}, or choose a smaller model.",
        )
    if length and model.positions and length > model.positions:
        raise ConfigError(f"--length {length}: the model takes {model.positions} tokens.", "Lower it.")
    dtype: Dtype = "bfloat16" if model.dtype == "bfloat16" or 8 * model.parameters > budget else "float32"
    labels = max(data.classes, 1) if data.task.startswith("text-") else data.classes
    rows = min(batch or ROWS, max(data.rows, 1))
    return Setting(length or _length(model, data), dtype, rows, labels, device, model.side)


def _length(model: ModelProfile, data: DataProfile) -> int:
    """Return the length of all but one row in a hundred, in steps of 8, and what an image adds."""
    if data.tokens is None:
        return 1
    found = -(-data.tokens[2] // 8) * 8 + (model.patches if data.task == "captioning" else 0)
    return min(found, model.positions or found)


def request(model: ModelProfile, data: DataProfile, how: Setting, method: str, fields: dict[str, Any]) -> Request:
    """Return what the planner is asked for a candidate."""
    return Request(
        model=model.source, method=method, fields=fields, task=data.task, labels=how.labels or 2, batch=how.batch,
        length=how.length, image=how.image, dtype=how.dtype, device=how.device,
    )  # fmt: skip


def cost(asked: Request, budget: int) -> Cost:
    """Return what a candidate takes, with the settings that give up least to fit.

    Raises:
        PeftreeError: the method does not fit the model.
    """
    whole = plan(asked)
    if whole.fits(budget):
        return Cost(whole, True, asked.batch, 1, False)
    least = plan(_with(asked, 1, True))
    if not least.fits(budget):
        return Cost(least, False, 1, asked.batch, True)
    for rows, checkpointing in LADDER:
        if rows < asked.batch or (checkpointing and rows == asked.batch):
            found = plan(_with(asked, rows, checkpointing))
            if found.fits(budget):
                return Cost(found, True, rows, -(-asked.batch // rows), checkpointing)
    return Cost(least, True, 1, asked.batch, True)


def _with(asked: Request, batch: int, checkpointing: bool) -> Request:
    return asked.model_copy(update={"batch": batch, "checkpointing": checkpointing})


def with_largest(found: Cost, budget: int) -> Cost:
    """Return `found` with the most rows at a time that fit."""
    return replace(found, largest=largest(found.plan.request, budget) if found.fits else 0)


def size(amount: float) -> str:
    """Return bytes for people: `23.4 GB`, 1 GB being 10^9 bytes."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if amount >= bytes_:
            return f"{amount / bytes_:.3g} {unit}"
    return f"{amount:.0f} bytes"
