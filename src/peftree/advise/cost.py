"""What a candidate takes, and the settings with which it fits the budget, from the planner; nothing is guessed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from peftree.advise.situation import DataProfile, ModelProfile
from peftree.errors import ConfigError
from peftree.plan import Plan, Request, largest, plan
from peftree.settings import MethodConfig

ROWS = 16  # of an optimizer step, as a run has by default; a smaller batch is made up for by accumulation
LEAST_LENGTH = 4  # tokens of a row that a run may have
# What is given up first: rows that are scored at a time, rows at a time, then activations.
LADDER = ((ROWS, False), (4, False), (ROWS, True), (4, True))
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Setting:
    """How the model is trained, whatever the method.

    Attributes:
        length: tokens per row; image: side of the images in pixels, 0 without images.
        dtype: the dtype of the base.
        batch: rows at a time, as requested.
        labels: number of classes, 0 for none.
    """

    length: int
    dtype: Dtype
    batch: int = ROWS
    labels: int = 0
    image: int = 0


@dataclass(frozen=True)
class Cost:
    """What a candidate takes.

    Attributes:
        plan: the plan of the settings that fit, or else of those that take least.
        fits: whether the plan is within the budget.
        batch, accumulation, checkpointing: those of these settings.
        largest: the most rows at a time that fit; None: not computed.
    """

    plan: Plan
    fits: bool
    batch: int
    accumulation: int
    checkpointing: bool
    largest: int | None = None


def setting(model: ModelProfile, data: DataProfile, run: Request) -> Setting:
    """Choose length and precision for a model, data and a budget; what the run sets is kept.

    Raises:
        ConfigError: the budget is below the weights themselves, or the model does not take rows of that length.
    """
    budget, length = run.memory, run.max_length
    if budget <= model.weights:
        raise ConfigError(
            f"The budget of {size(budget)} is below the weights of {model.source} themselves: "
            f"{model.parameters:,} parameters take {size(model.weights)} in bfloat16.",
            f"Give more than {size(model.weights)}, or choose a smaller model.",
        )
    if length and model.positions and length > model.positions:
        raise ConfigError(f"max_length={length}: the model takes {model.positions} tokens.", "Lower it.")
    dtype: Dtype = "bfloat16" if model.dtype == "bfloat16" or 8 * model.parameters > budget else "float32"
    if "dtype" in run.model_fields_set:
        dtype = run.dtype
    labels = max(data.classes, 1) if data.task.startswith("text-") else data.classes
    rows = min(run.batch_size, max(data.rows, 1))
    return Setting(length or _length(model, data), dtype, rows, labels, model.side)


def _length(model: ModelProfile, data: DataProfile) -> int:
    """Return the length that covers all but one row in a hundred, in steps of 8, plus what an image adds."""
    if data.tokens is None:
        return 1
    found = -(-data.tokens[2] // 8) * 8 + (model.patches if data.task == "captioning" else 0)
    return min(found, model.positions or found)


def request(run: Request, data: DataProfile, how: Setting, method: str, fields: dict[str, Any]) -> Request:
    """Return the planner's request for a candidate: the run, with what advice decides."""
    decided = {
        "method": MethodConfig(name=method, fields=fields), "task": data.task, "labels": how.labels or 2,
        "batch_size": how.batch, "max_length": max(how.length, LEAST_LENGTH), "image_size": how.image or None,
        "dtype": how.dtype,
    }  # fmt: skip
    return Request(**{name: getattr(run, name) for name in Request.model_fields} | decided)


def cost(asked: Request, budget: int) -> Cost:
    """Return what a candidate takes, with the settings that sacrifice least to fit.

    Raises:
        PeftreeError: the method does not fit the model.
    """
    whole = plan(asked)
    if whole.fits(budget):
        return _cost(whole, True)
    least = plan(_with(asked, 1, True))
    if not least.fits(budget):
        return _cost(least, False)
    kept = asked.gradient_checkpointing
    for rows, checkpointing in LADDER:
        less = rows < asked.batch_size or checkpointing > kept or whole.phase == "scoring"
        if checkpointing >= kept and rows <= asked.batch_size and less:
            found = plan(_with(asked, rows, checkpointing))
            if found.fits(budget):
                return _cost(found, True)
    return _cost(least, True)


def _with(asked: Request, rows: int, checkpointing: bool) -> Request:
    """Return the request with this many rows at a time and no fewer per step; with all if their rows are compared."""
    rows = asked.batch_size if asked.contrastive else rows
    passes, scored = -(-asked.batch_size * asked.accumulation // rows), min(rows, asked.eval_batch_size)
    kept = "checkpoint" if checkpointing else "exact" if asked.gradient_checkpointing else asked.activations
    changes = {"batch_size": rows, "accumulation": passes, "activations": kept}
    return asked.model_copy(update=changes | {"eval_batch_size": scored})


def _cost(found: Plan, fits: bool) -> Cost:
    asked = found.request
    return Cost(found, fits, asked.batch_size, asked.accumulation, asked.gradient_checkpointing)


def with_largest(found: Cost, budget: int) -> Cost:
    """Return `found` with the most rows at a time that fit."""
    return replace(found, largest=largest(found.plan.request, budget) if found.fits else 0)


def size(amount: float) -> str:
    """Return bytes in words: `23.4 GB`, where 1 GB is 10^9 bytes."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if amount >= bytes_:
            return f"{amount / bytes_:.3g} {unit}"
    return f"{amount:.0f} bytes"
