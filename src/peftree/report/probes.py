"""The probes of the runs of a row, checked and averaged over their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from peftree.errors import DataError
from peftree.evaluate.subject import UNMEASURED, Result, Unmeasured
from peftree.probes import probes as kinds
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
