"""One run, one record: what was trained, how well it did, what it cost, and its content address. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    model_validator,
)

from peftree.catalogue import Aggregate, Branch, Kind, Modality
from peftree.errors import TrainError
from peftree.files import atomic_write

SCHEMA_VERSION: Literal[2] = 2
# The fields that tell one run from another.
IDENTITY = (
    *("suite", "task", "dataset", "data", "model", "method"),
    *("fields", "budget", "learning_rate", "seed", "phase"),
)
Text = Annotated[str, Field(min_length=1)]


def _finite_or_none(value: Any) -> Any:
    """Turn NaN and infinity into None: a diverged loss is a gap in a curve, not invalid JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[FiniteFloat | None, BeforeValidator(_finite_or_none)]
Seconds = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] | None
Count = NonNegativeInt | None


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CurvePoint(_Strict):
    """One point of a learning curve, with the score on validation rows; None if not measured or not finite."""

    step: NonNegativeInt
    loss: Measured = None
    score: Measured = None


class Costs(_Strict):
    """What a run costs, in bytes and seconds; None if it was not measured.

    Attributes:
        adapter_bytes: bytes of the saved files.
        peak_rss_bytes: most resident memory while training, or of the process as a whole if the kernel cannot restart
            that count; rss_after_load_bytes: resident memory before training.
        device_peak_bytes: most memory of tensors on the CUDA device while training; None on a CPU.
        saved_for_backward_bytes: what the graph of the first training pass keeps; None where passes are compiled.
        gradient_bytes, optimizer_bytes: bytes of one gradient per trained tensor, and of the optimizer's state.
        allocator_peak_bytes: most that torch's CPU allocator held in one forward and backward pass of the first rows.
        peak_bytes: most bytes of tensors at once in training or scoring, including the model's and the optimizer's: on
            CUDA from the allocator, on a CPU for the largest batches, without the optimizer's update.
        planned_bytes: the planner's figure for the same.
        setup_seconds, train_seconds, eval_seconds: wall time, each without the others.
        cpu_seconds: processor time of training only.
        step_seconds: median of the steps after the first two; processor time on one thread of a CPU, else wall time.
        throughput: rows per second of training, times their tokens if they are text; see `throughput_unit`.
    """

    adapter_bytes: Count = None
    peak_rss_bytes: Count = None
    rss_after_load_bytes: Count = None
    device_peak_bytes: Count = None
    saved_for_backward_bytes: Count = None
    gradient_bytes: Count = None
    optimizer_bytes: Count = None
    allocator_peak_bytes: Count = None
    peak_bytes: Count = None
    planned_bytes: Count = None
    setup_seconds: Seconds = None
    train_seconds: Seconds = None
    eval_seconds: Seconds = None
    cpu_seconds: Seconds = None
    step_seconds: Seconds = None
    throughput: Seconds = None
    throughput_unit: Literal["", "tokens/s", "images/s"] = ""

    @property
    def rest_bytes(self) -> float | None:
        """The part of the peak besides load, gradients, optimizer and what is saved for backward."""
        parts = (self.rss_after_load_bytes, self.gradient_bytes, self.optimizer_bytes, self.saved_for_backward_bytes)
        if self.peak_rss_bytes is None or None in parts:
            return None
        return max(0.0, self.peak_rss_bytes - sum(part for part in parts if part is not None))


class Run(Costs):
    """The results of a run. `metrics.json` in its output folder holds them under the same names, and the rate as `lr`.

    Attributes:
        task, model, method, branch, fields, learning_rate, seed: what was trained.
        metric, higher_is_better, aggregate: the primary metric, and how `items` give it: their mean, or ``exp(mean)``
            if it is ``exp_mean`` (perplexity from losses).
        split: `test`, or `valid` if no test file was given.
        score, values, items: after training, on that split, `items` in its order; see `evaluate.quality.Scores`.
        base_score, base_values, base_items: the same without the adapter; empty if not asked for.
        base_known: whether an earlier run measured these, all that they depend on being the same; None: unknown.
        constant_score: the score of one answer for all rows (the commonest class or text, or the mean); or None.
        no_better_than: which of the two the score does not beat; empty if it beats them.
        labels: class names in the order of the model's outputs.
        trainable_parameters, total_parameters: parameters of the adapter, and of the base model.
        output: the folder that holds it.
        environment: versions, machine and threads.
    """

    task: Text
    model: Text
    method: Text
    branch: Branch
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    learning_rate: Annotated[FiniteFloat, Field(gt=0)] | None = None
    seed: NonNegativeInt
    metric: Text
    higher_is_better: bool = True
    aggregate: Aggregate = "mean"
    split: Literal["", "valid", "test"] = ""
    score: FiniteFloat | None = None
    values: dict[str, FiniteFloat] = Field(default_factory=dict)
    items: tuple[FiniteFloat, ...] = ()
    base_score: FiniteFloat | None = None
    base_values: dict[str, FiniteFloat] = Field(default_factory=dict)
    base_items: tuple[FiniteFloat, ...] = ()
    base_known: bool | None = None
    constant_score: FiniteFloat | None = None
    no_better_than: str = ""
    labels: tuple[str, ...] = ()
    n_train: Count = None
    steps: Count = None
    batch_size: Count = None
    sites: Count = None
    trainable_parameters: Count = None
    total_parameters: Count = None
    curve: tuple[CurvePoint, ...] = ()
    output: str = ""
    environment: dict[str, str | int | float | bool | None] = Field(default_factory=dict)

    @property
    def lr(self) -> float | None:
        """The learning rate, under its name among a run's settings."""
        return self.learning_rate

    def metrics(self) -> dict[str, Any]:
        """Return the content of `metrics.json`."""
        return self.model_dump(mode="json") | {"lr": self.lr}

    @property
    def seconds(self) -> float:
        """Wall time of the run as a whole."""
        return sum(part or 0.0 for part in (self.setup_seconds, self.train_seconds, self.eval_seconds))


class RunRecord(Run):
    """A run among others: one method, one task, one model and one seed of a suite, in one JSON file.

    `phase`: a ``trial`` is one try of a learning rate, scored on validation rows only, which is what
    `score` and `items` then are; a ``final`` run is scored on the test rows. `data` is the SHA-256 of
    all data files, `own_data` that of the task's own, without those of probes and stages, and `suite_hash`
    that of the suite when the run was made. `probes` is what was found beyond quality: probe -> its figures.

    `status`: ``ok``; ``failed`` (tried again by the next call); ``diverged`` (the loss or output was
    not finite: a result like any other); ``inapplicable`` (the method cannot be put on this model).
    All but ``ok`` have an `error`, and every measurement may then be absent.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    suite: Text
    suite_hash: str = ""
    phase: Literal["trial", "final"] = "final"
    dataset: Text
    data: str = ""
    own_data: str = ""
    modality: Modality
    kind: Kind
    budget: dict[str, JsonValue] = Field(default_factory=dict)
    probes: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    status: Literal["ok", "failed", "diverged", "inapplicable"]
    error: str = ""
    started: datetime

    @classmethod
    def of(cls, run: Run, planned: Mapping[str, Any], started: datetime, **found: Any) -> Self:
        """Return the record of a finished run, without its folder.

        Args:
            run: the results of the run.
            planned: the record's fields that were known before; they may name task and model differently.
            started: the time when it started.
            found: further findings.

        Raises:
            TrainError: the run is not the one that was planned.
        """
        told = dict(run)
        wrong = [k for k, v in planned.items() if k in told and k not in ("task", "model") and v != told[k]]
        if wrong:
            raise TrainError(f"The run differs from its plan in {', '.join(wrong)}.", "Correct the suite or its job.")
        return cls(**{**told, "output": "", **found, **planned}, status="ok", started=started)

    @model_validator(mode="after")
    def _status_fits(self) -> Self:
        if self.status == "ok" and self.score is None:
            raise ValueError("status is 'ok' but score is missing")
        if self.status != "ok" and not self.error:
            raise ValueError(f"status is '{self.status}' but error is empty")
        return self

    @property
    def key(self) -> str:
        """The content address: 16 hexadecimal digits, see `run_key`."""
        return run_key(vars(self))

    @property
    def settled(self) -> bool:
        """Whether repeating the run would give nothing new."""
        return self.status != "failed"

    def write(self, folder: str | Path) -> Path:
        """Write the record to `folder` under its content address, atomically; return the path."""
        text = json.dumps(self.model_dump(mode="json"), allow_nan=False, separators=(",", ":"))
        return atomic_write(Path(folder) / file_name(self.key), text + "\n")


def run_key(facts: Mapping[str, Any]) -> str:
    """Return the content address of a run from what defines it, so it is known before the run starts.

    A runner asks for this key first and skips the run if ``folder / file_name(key)`` exists.

    Args:
        facts: the fields of `IDENTITY`, or those without a default; others do not count.
    """
    known = {name: RunRecord.model_fields[name].get_default(call_default_factory=True) for name in IDENTITY}
    known |= {name: facts[name] for name in IDENTITY if name in facts}
    if known["learning_rate"] is not None:
        known["learning_rate"] = float(known["learning_rate"])
    text = json.dumps(list(known.values()), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(key: str) -> str:
    """Return the file name of the record with content address `key`."""
    return f"run-{key}.json"


def in_order(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return `records` in their one fixed order."""
    return sorted(records, key=lambda r: (r.suite, r.task, r.dataset, r.method, r.seed, r.key))
