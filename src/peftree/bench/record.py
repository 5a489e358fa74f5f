"""One run, one record, one JSON file: what was trained, how well it did, what it cost."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
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
    ValidationError,
    model_validator,
)

from peftree.errors import DataError, StoreError, did_you_mean
from peftree.files import atomic_write, read_json

SCHEMA_VERSION: Literal[2] = 2
MAX_BYTES = 64 << 20
PATTERN = "run-*.json"

Branch = Literal["additive", "selective", "reparameterized", "hybrid", "moe", "unified", "reference"]
Text = Annotated[str, Field(min_length=1)]


def _finite_or_none(value: Any) -> Any:
    """Turn NaN and infinity into None: a diverged loss is a gap in a curve, not bad JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[FiniteFloat | None, BeforeValidator(_finite_or_none)]
Seconds = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)] | None
Count = NonNegativeInt | None


class CurvePoint(BaseModel):
    """One point of a learning curve; a loss that was not finite is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: NonNegativeInt
    loss: Measured = None
    score: Measured = None


class RunRecord(BaseModel):
    """The record of one run: one method, one task, one model, one seed.

    `items` holds one number for each test item, in the order of the test set; `score` is their
    mean, or ``exp(mean)`` where `aggregate` is ``exp_mean`` (perplexity from losses). Bytes are
    bytes, times are seconds, `step_seconds` is the median of a training step after warm-up (processor time on one
    thread of a CPU, else wall time).

    `phase`: a ``trial`` is one try of a learning rate, scored on validation rows only, which is what
    `score` and `items` then are; a ``final`` run is scored on the test rows. `data` is the SHA-256 of
    all data files, `own_data` that of the task's own alone, without those of probes and stages, and `suite_hash`
    that of the suite as it was when the run was made. `values` holds further metrics by name, `probes` what was
    found beyond quality: probe -> its figures.

    `status`: ``ok``; ``failed`` (tried again by the next call); ``diverged`` (the loss or output was
    not finite: a result like any other); ``inapplicable`` (the method cannot be put on this model).
    All but ``ok`` have an `error`, and every measurement may then be absent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = SCHEMA_VERSION
    suite: Text
    suite_hash: str = ""
    phase: Literal["trial", "final"] = "final"
    task: Text
    dataset: Text
    data: str = ""
    own_data: str = ""
    model: Text
    modality: Literal["language", "vision", "vision-language"]
    kind: Literal["understanding", "generation"]
    method: Text
    branch: Branch
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    budget: dict[str, JsonValue] = Field(default_factory=dict)
    learning_rate: Annotated[FiniteFloat, Field(gt=0)] | None = None
    seed: NonNegativeInt
    metric: Text
    higher_is_better: bool = True
    aggregate: Literal["mean", "exp_mean"] = "mean"
    score: FiniteFloat | None = None
    base_score: FiniteFloat | None = None
    items: tuple[FiniteFloat, ...] = ()
    values: dict[str, FiniteFloat] = Field(default_factory=dict)
    probes: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    n_train: Count = None
    steps: Count = None
    batch_size: Count = None
    trainable_parameters: Count = None
    total_parameters: Count = None
    sites: Count = None
    adapter_bytes: Count = None
    peak_rss_bytes: Count = None
    rss_after_load_bytes: Count = None
    saved_for_backward_bytes: Count = None
    gradient_bytes: Count = None
    optimizer_bytes: Count = None
    allocator_peak_bytes: Count = None
    setup_seconds: Seconds = None
    train_seconds: Seconds = None
    eval_seconds: Seconds = None
    cpu_seconds: Seconds = None
    step_seconds: Seconds = None
    throughput: Seconds = None
    throughput_unit: Literal["", "tokens/s", "images/s"] = ""
    curve: tuple[CurvePoint, ...] = ()
    status: Literal["ok", "failed", "diverged", "inapplicable"]
    error: str = ""
    environment: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    started: datetime

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
        return run_key(
            suite=self.suite,
            task=self.task,
            dataset=self.dataset,
            data=self.data,
            model=self.model,
            method=self.method,
            fields=self.fields,
            budget=self.budget,
            learning_rate=self.learning_rate,
            seed=self.seed,
            phase=self.phase,
        )

    @property
    def settled(self) -> bool:
        """Whether doing the run again would give nothing new."""
        return self.status != "failed"

    def write(self, folder: str | Path) -> Path:
        """Write the record to `folder` under its content address, atomically; return the path."""
        text = json.dumps(self.model_dump(mode="json"), allow_nan=False, separators=(",", ":"))
        return atomic_write(Path(folder) / file_name(self.key), text + "\n")


def run_key(
    *,
    suite: str,
    task: str,
    dataset: str,
    data: str,
    model: str,
    method: str,
    fields: dict[str, JsonValue],
    budget: dict[str, JsonValue],
    learning_rate: float | None,
    seed: int,
    phase: str,
) -> str:
    """Return the content address of a run from what defines it, so known before it starts.

    A runner asks for this key first and skips the run if ``folder / file_name(key)`` exists.
    """
    rate = None if learning_rate is None else float(learning_rate)
    identity = [suite, task, dataset, data, model, method, fields, budget, rate, seed, phase]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(key: str) -> str:
    """Return the file name of the record with content address `key`."""
    return f"run-{key}.json"


def read_record(path: str | Path) -> RunRecord:
    """Read one record.

    Raises:
        DataError: the file is not JSON, of another schema version, has an unknown, missing or
            wrong field (named), or does not carry the name of its content.
    """
    path = Path(path)
    try:
        data = read_json(path, limit=MAX_BYTES)
    except StoreError as error:
        raise DataError(error.what, "Delete the file and run this cell again.") from None
    record = parse_record(data, str(path))
    if path.name != file_name(record.key):
        raise DataError(
            f"{path} holds the run {record.key} but is not named {file_name(record.key)}.",
            "A copied or edited record counts twice or wrongly: rename it back or delete it.",
        )
    return record


def parse_record(data: dict[str, JsonValue], where: str) -> RunRecord:
    """Return the record in `data`, which was read from `where`.

    Raises:
        DataError: another schema version, or an unknown, missing or wrong field (named).
    """
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{where}: field 'schema_version' is {version!r}; this version reads {SCHEMA_VERSION}.",
            "Read it with the version of peftree that wrote it, or run it again.",
        )
    try:
        return RunRecord.model_validate(data)
    except ValidationError as error:
        raise DataError(f"{where}: {_explain(error)}", "Correct the field or run again.") from None


def read_records(folder: str | Path) -> list[RunRecord]:
    """Read all records (``run-*.json``) of `folder`, sorted by task, method, seed and key.

    Raises:
        DataError: the folder is missing or holds no record, or a file is bad (see `read_record`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.", "Give the folder the runs were written to.")
    paths = sorted(folder.glob(PATTERN))
    if not paths:
        raise DataError(
            f"{folder} holds no run records ({PATTERN}) and no runs.", "Name what demo, bench or train wrote."
        )
    return in_order(read_record(path) for path in paths)


def in_order(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return `records` in their one fixed order."""
    return sorted(records, key=lambda r: (r.suite, r.task, r.dataset, r.method, r.seed, r.key))


def _explain(error: ValidationError) -> str:
    """Return one line for the first three problems, each with its field."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False)[:3]:
        field = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
            message = f"unknown. {did_you_mean(field, RunRecord.model_fields)}"
        elif problem["type"] == "missing":
            message = "missing"
        lines.append(f"field '{field}': {message}" if field else message)
    rest = error.error_count() - len(lines)
    return "; ".join(lines) + (f"; and {rest} more." if rest else ".")
