"""The probes of the runs of a row, checked and averaged over their seeds; other test sets and sequences of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from peftree.bench import intervals
from peftree.bench.grouping import Sample, aligned, sample
from peftree.bench.transfer import transfer
from peftree.errors import DataError
from peftree.evaluate.subject import UNMEASURED, Result, Unmeasured
from peftree.probes import probes as kinds
from peftree.report.data import Shifted, Stages
from peftree.runs.record import RunRecord
from peftree.strict import explain
from peftree.text import clean


def probes(records: Sequence[RunRecord], usual: Sequence[RunRecord]) -> dict[str, Result]:
    """Return each probe's means over the finished runs `records`; timings are means over `usual` only.

    Raises:
        DataError: a probe's figures do not have the form that the report reads (run and field are named).
    """
    out: dict[str, Result] = {}
    for name, probe in kinds().items():
        runs = usual if probe.timed else records
        found = [_read(probe.result, record, name) for record in runs if name in record.probes]
        measured = [one for one in found if not isinstance(one, Unmeasured)]
        apart = set(probe.result.apart)
        dumped = [one.model_dump(mode="json", by_alias=True, exclude=apart) for one in measured]
        if dumped:
            out[name] = probe.result.model_validate(mean(dumped))
        elif found:
            out[name] = found[-1]
    return out


def wrong(record: RunRecord, probe: str, problem: str) -> DataError:
    """Return the error for a probe of `record` that cannot be read."""
    where = f"Run {record.key}, probe '{probe}'"
    return DataError(clean(f"{where}: {problem}"), "Correct the probe and run it again.")


def _read(kind: type[Result], record: RunRecord, name: str) -> Result:
    kind = Unmeasured if record.probes[name].keys() == {UNMEASURED} else kind
    try:
        return kind.model_validate(record.probes[name])
    except ValidationError as error:
        raise wrong(record, name, explain(error, kind)[0]) from None


def mean(values: Sequence[Any]) -> Any:
    """Return the mean of equally built JSON values, number by number; for anything else, the first.

    >>> mean([{"a": [1, 2], "b": "x"}, {"a": [3, None], "b": "x"}])
    {'a': [2.0, 2.0], 'b': 'x'}
    """
    known = [value for value in values if value is not None and not (isinstance(value, dict) and UNMEASURED in value)]
    if not known:
        return None
    if all(isinstance(value, dict) for value in known):
        keys = dict.fromkeys(key for value in known for key in value)
        return {key: mean([value[key] for value in known if key in value]) for key in keys}
    if all(isinstance(value, list) for value in known) and len({len(value) for value in known}) == 1:
        return [mean(column) for column in zip(*known, strict=True)]
    if all(isinstance(value, int | float) for value in known):
        return sum(known) / len(known)
    return known[0]


class _Set(Result):
    score: FiniteFloat
    items: tuple[FiniteFloat, ...] = ()


class _Matrix(Result):
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
