"""Other test sets and sequences of tasks: the probes `shift` and `sequence` of a row's runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from peftree.bench import intervals
from peftree.bench.grouping import Sample, aligned, sample
from peftree.bench.transfer import transfer
from peftree.errors import DataError
from peftree.evaluate.subject import UNMEASURED
from peftree.report.data import Shifted, Stages
from peftree.report.probes import mean, wrong
from peftree.runs.record import RunRecord
from peftree.strict import explain
from peftree.text import clean


class _Set(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    score: FiniteFloat
    items: tuple[FiniteFloat, ...] = ()


class _Matrix(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    tasks: tuple[str, ...] = Field(min_length=2)
    scores: tuple[Annotated[tuple[FiniteFloat, ...], Field(min_length=2)], ...]


_SETS = TypeAdapter(dict[str, _Set])


def shifted(records: Sequence[RunRecord], full: Sequence[RunRecord]) -> tuple[Shifted, ...]:
    """Return the score on each other test set with its interval and difference from full's.

    Raises:
        DataError: a run's `shift` does not have the form ``{set: {"score": number, "items": [...]}}``.
    """
    mine, theirs = _samples(records), _samples(full)
    out = []
    for name, one in mine.items():
        pair = aligned(one, theirs[name]) if name in theirs else None
        gap = intervals.difference(*pair, exponential=one.exponential) if pair else None
        out.append(Shifted(name, one.interval, gap))
    return tuple(out)


def stages(records: Sequence[RunRecord]) -> Stages | None:
    """Return the mean matrix of a sequence of tasks over the finished runs, and its transfer.

    Raises:
        DataError: a run's `sequence` does not have the form ``{"tasks": [...], "scores": [[...]]}``.
    """
    found: list[tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]] = []
    for record in records:
        data = record.probes.get("sequence")
        if record.status != "ok" or not data or UNMEASURED in data:
            continue
        try:
            matrix = _Matrix.model_validate(data)
            transfer(matrix.scores)
        except ValidationError as error:
            raise wrong(record, "sequence", explain(error, _Matrix)[0]) from None
        except DataError as error:
            raise wrong(record, "sequence", error.what) from None
        if len(matrix.scores[0]) != len(matrix.tasks):
            raise wrong(record, "sequence", f"{len(matrix.tasks)} tasks, {len(matrix.scores[0])} scores.")
        found.append((matrix.tasks, matrix.scores))
    if not found:
        return None
    if len({(tasks, len(scores)) for tasks, scores in found}) > 1:
        raise wrong(records[0], "sequence", "the runs of a method went through different stages.")
    scores = tuple(tuple(row) for row in mean([[list(row) for row in each] for _, each in found]))
    higher = records[0].higher_is_better
    return Stages(tuple(clean(t) for t in found[0][0]), scores, transfer(scores, higher_is_better=higher))


def _samples(records: Sequence[RunRecord]) -> dict[str, Sample]:
    """Return a sample for each set that every finished run was scored on."""
    sets: dict[str, list[RunRecord]] = {}
    done = [r for r in records if r.status == "ok"]
    for record in done:
        data = record.probes.get("shift", {})
        if UNMEASURED in data:
            continue
        try:
            found = _SETS.validate_python(data)
        except ValidationError as error:
            raise wrong(record, "shift", explain(error, _Set)[0]) from None
        for name, one in found.items():
            change = {"score": one.score, "items": one.items}
            sets.setdefault(clean(name), []).append(record.model_copy(update=change))
    samples = {name: sample(runs) for name, runs in sets.items() if len(runs) == len(done)}
    return {name: one for name, one in samples.items() if one is not None}
