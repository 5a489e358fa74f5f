"""What a report says, as plain data: tasks, rows, failures, environments."""

from __future__ import annotations

from dataclasses import dataclass

from peftree.bench.record import CurvePoint
from peftree.bench.statistics import Interval

BRANCHES = (
    "additive",
    "selective",
    "reparameterized",
    "hybrid",
    "moe",
    "unified",
    "reference",
)
FULL = "full"
HEAD_ONLY = "head_only"


@dataclass(frozen=True)
class Costs:
    """Medians over the seeds of a row; None where no run measured it. Bytes and seconds."""

    peak: float | None = None
    after_load: float | None = None
    saved: float | None = None
    disk: float | None = None
    train: float | None = None
    setup: float | None = None
    evaluate: float | None = None
    cpu: float | None = None
    step: float | None = None


@dataclass(frozen=True)
class Curve:
    """The learning curve of one seed."""

    seed: int
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Run:
    """Where a number comes from: the seed and content address of one run."""

    seed: int
    key: str
    status: str


@dataclass(frozen=True)
class Row:
    """One method, with one choice of fields, on one task: all its seeds together."""

    label: str
    method: str
    branch: str
    settings: str
    runs: tuple[Run, ...]
    seeds: int
    items: int
    covers: str
    trainable: int | None
    share: float | None
    sites: int | None
    score: Interval | None
    difference: Interval | None
    verdict: str
    better: bool | None
    p: float | None
    p_holm: float | None
    relative: Interval | None
    costs: Costs
    peak_share: float | None
    curves: tuple[Curve, ...]

    @property
    def failed(self) -> int:
        """How many of the runs failed."""
        return sum(run.status == "failed" for run in self.runs)


@dataclass(frozen=True)
class Task:
    """One comparison: the methods tried on one task, data set, model and suite."""

    anchor: str
    suite: str
    name: str
    dataset: str
    model: str
    modality: str
    kind: str
    metric: str
    higher_is_better: bool
    decimals: int
    rows: tuple[Row, ...]
    full: str | None
    baseline: str
    statement: str
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The heading: task, data set and model."""
        return f"{self.name}: {self.dataset}, {self.model}"

    @property
    def scored(self) -> tuple[Row, ...]:
        """The rows that have a score."""
        return tuple(row for row in self.rows if row.score is not None)

    def row(self, label: str | None) -> Row | None:
        """Return the row called `label`."""
        return next((row for row in self.rows if row.label == label), None)


@dataclass(frozen=True)
class Failure:
    """One failed run."""

    task: str
    method: str
    seed: int
    key: str
    error: str


@dataclass(frozen=True)
class Environment:
    """One machine and software state, with how many runs it made."""

    facts: tuple[tuple[str, str], ...]
    runs: int


@dataclass(frozen=True)
class Report:
    """All a renderer needs. Every string is already free of control characters."""

    suites: tuple[str, ...]
    summary: str
    runs: int
    failures: tuple[Failure, ...]
    tasks: tuple[Task, ...]
    environments: tuple[Environment, ...]
