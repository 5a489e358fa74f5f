"""The content of a report as plain data: tasks, rows, trials, failures, environments."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftree.bench.expected import Expected
from peftree.bench.intervals import Interval
from peftree.bench.ranks import Ranks
from peftree.bench.transfer import Transfer
from peftree.evaluate.subject import Result
from peftree.runs.record import Costs, CurvePoint


@dataclass(frozen=True)
class Curve:
    """The learning curve of one seed."""

    seed: int
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Origin:
    """Where a number comes from: the seed and content address of one run."""

    seed: int
    key: str
    status: str


@dataclass(frozen=True)
class Shifted:
    """The score on another test set, and its paired difference from full fine-tuning there."""

    name: str
    score: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Stages:
    """A sequence of tasks: mean scores ``[stage][task]`` over the seeds, and their summary."""

    tasks: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    transfer: Transfer


@dataclass(frozen=True)
class Row:
    """One method, with one choice of fields, on one task: all its seeds together.

    `reason` is why there is no score. `detectable` is the smallest difference from full fine-tuning
    that these seeds and items show with 80 % power. `costs` are medians over the seeds. `before` is the mean score of
    the model without the adapter.
    """

    label: str
    method: str
    branch: str
    settings: str
    runs: tuple[Origin, ...]
    seeds: int
    items: int
    covers: str
    trainable: int | None
    share: float | None
    sites: int | None
    score: Interval | None
    verdict: str
    costs: Costs
    curves: tuple[Curve, ...]
    before: float | None = None
    difference: Interval | None = None
    better: bool | None = None
    p: float | None = None
    p_holm: float | None = None
    relative: Interval | None = None
    peak_share: float | None = None
    retained: str = ""
    detectable: float | None = None
    test: str = ""
    reason: str = ""
    probes: dict[str, Result] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    shifted: tuple[Shifted, ...] = ()
    stages: Stages | None = None

    @property
    def failed(self) -> int:
        """How many of the runs gave no score."""
        return sum(run.status != "ok" for run in self.runs)


@dataclass(frozen=True)
class Trial:
    """One try of a learning rate, scored on validation rows."""

    rate: float
    score: float | None
    status: str
    seconds: float | None
    key: str


@dataclass(frozen=True)
class Tuning:
    """All trials of one method on one task.

    `low` to `high` is the range of rates around the best one in which every trial scored within 95 %
    of it; `expected` counts a diverged trial with the worst score of any method's trial.
    """

    label: str
    method: str
    branch: str
    trials: tuple[Trial, ...]
    best: Trial | None
    low: float | None
    high: float | None
    expected: Expected | None


@dataclass(frozen=True)
class Task:
    """One comparison: the methods tried on one task, data set, model and suite.

    Tasks with the same `setting` differ only in the `share` of the training rows and that of wrong labels, `wrong`;
    those with the same `family` also in the model, whose size is `parameters`. Tasks with one `source` share rows.
    """

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
    tuning: tuple[Tuning, ...] = ()
    source: str = ""
    setting: str = ""
    family: str = ""
    parameters: int = 0
    share: float = 1.0
    wrong: float = 0.0

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
class Overview:
    """One suite's methods over all of its tasks. `ranks` is None if fewer than two can be ranked."""

    suite: str
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    ranks: Ranks | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """One run without a score, and why."""

    task: str
    method: str
    seed: int
    key: str
    error: str
    status: str = "failed"
    phase: str = "final"


@dataclass(frozen=True)
class Environment:
    """One machine and software state, with its number of runs."""

    facts: tuple[tuple[str, str], ...]
    runs: int


@dataclass(frozen=True)
class Report:
    """All a renderer needs. Every string is already free of control characters."""

    suites: tuple[str, ...]
    summary: str
    headlines: tuple[str, ...]
    runs: int
    failures: tuple[Failure, ...]
    tasks: tuple[Task, ...]
    environments: tuple[Environment, ...]
    overviews: tuple[Overview, ...] = ()
