"""Evidence as small tables: what was measured of a method on a task, where, how certain it is. Imports no torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, JsonValue, ValidationError

from peftree.catalogue import Kind, Modality
from peftree.errors import DataError
from peftree.files import read_json
from peftree.strict import Strict, explain

FOLDER = Path(__file__).with_name("evidence")
Number = FiniteFloat | None


class Context(Strict):
    """A task on which methods were compared.

    Attributes:
        group: tasks of one group share data and tuning, so they are not independent evidence.
        tier: `small`, `full` ..., or `published` for figures from elsewhere.
        parameters: those of the base model; rows and steps: those of a run's training.
        baseline: what the gain is measured from: `head_only`, `untrained` (the model before training), or `zero`.
        forgetting: what `Measured.forgets` is, empty if it was not measured.
    """

    source: str
    group: str
    tier: str
    modality: Modality
    kind: Kind
    metric: str
    model: str
    parameters: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=0)]
    baseline: Literal["head_only", "untrained", "zero", "none"]
    forgetting: str = ""


class Measured(Strict):
    """The result of one method on one task.

    Attributes:
        fields: the fields that differ from the method's defaults.
        seeds: number of finished runs; diverged: number of runs that ended because a number was not finite.
        score: in the metric's units; gain: above the baseline, higher is better (log units for perplexity).
        relative: gain over the mean of the task's three best gains: 0 is the baseline, 1 what the best methods
            reach; low, high: its 95 % interval.
        times: the best learning rate, relative to the method's default.
        time: the time of a step, relative to full fine-tuning.
        forgets: see `Context.forgetting`; more is worse.
    """

    task: str
    method: str
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    seeds: Annotated[int, Field(ge=0)]
    diverged: Annotated[int, Field(ge=0)] = 0
    score: Number = None
    gain: Number = None
    relative: Number = None
    low: Number = None
    high: Number = None
    times: Number = None
    time: Number = None
    forgets: Number = None
    trainable: int | None = None

    @property
    def key(self) -> str:
        """The method with its fields, as one text."""
        return key(self.method, self.fields)


class Table(Strict):
    """One source's evidence.

    Attributes:
        origin: where the figures come from, with a commit or hash.
        contexts: task -> its description.
        results: one per method and task.
    """

    origin: str
    contexts: dict[str, Context]
    results: tuple[Measured, ...]


def key(method: str, fields: dict[str, Any]) -> str:
    """Return a method with its fields as one text: `lora r=16 sites=linear`."""
    return " ".join([method, *(f"{name}={_short(value)}" for name, value in sorted(fields.items()))])


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_table(path: Path) -> Table:
    """Read a table.

    Raises:
        DataError: the table is missing or damaged.
    """
    try:
        return Table.model_validate(read_json(path, limit=16 << 20))
    except ValidationError as error:
        what = explain(error, Table, f"{path} is not a table of evidence")[0]
        raise DataError(what, "Make it with `make study`.") from None


@cache
def known() -> tuple[Table, ...]:
    """Return the tables that come with the package."""
    return tuple(read_table(path) for path in sorted(FOLDER.glob("*.json")))
