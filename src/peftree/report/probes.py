"""What the runs of a row were probed for, checked and averaged over their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from peftree.bench.record import RunRecord
from peftree.errors import DataError
from peftree.report.text import clean

UNMEASURED = "not measured"


def _listed(value: Any) -> Any:
    """Let one number stand for a list of one; a part that was not measured is none."""
    return None if isinstance(value, dict) else [value] if isinstance(value, int | float) else value


def _measured(value: Any) -> Any:
    """A part that was not measured is empty."""
    return {} if isinstance(value, dict) and UNMEASURED in value else value


Numbers = Annotated[tuple[FiniteFloat, ...] | None, BeforeValidator(_listed)]
Some = Annotated[dict[str, FiniteFloat], BeforeValidator(_measured)]
Kinds = dict[str, Numbers]


class _Probe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)


class Calibration(_Probe):
    """Of a classifier's probabilities: expected calibration error, Brier score, log loss."""

    ece: FiniteFloat | None = None
    brier: FiniteFloat | None = None
    nll: FiniteFloat | None = None
    accuracy: FiniteFloat | None = None
    confidence: FiniteFloat | None = None


class Robustness(_Probe):
    """Scores on damaged input, by severity and by kind of damage."""

    clean: FiniteFloat
    severities: tuple[FiniteFloat, ...] = Field(min_length=1)
    kinds: Kinds = Field(default_factory=dict)


class Retention(_Probe):
    """A measure on general data before and after; `change` is paired, with its interval over items."""

    measure: str
    before: FiniteFloat
    after: FiniteFloat
    change: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None


class Routing(_Probe):
    """How a mixture's routers spread tokens over experts."""

    load: Numbers = None
    balance: FiniteFloat | None = None
    entropy: FiniteFloat | None = None
    confidence: FiniteFloat | None = None


class Interpretability(_Probe):
    """What the adapter changed in weights and hidden states."""

    relative_update: FiniteFloat | None = None
    effective_rank: FiniteFloat | None = None
    stable_rank: FiniteFloat | None = None
    intruders: Some = Field(default_factory=dict)
    cka: Numbers = None
    knockout: Some = Field(default_factory=dict)
    routing: Annotated[Routing, BeforeValidator(_measured)] = Routing()


class Latency(_Probe):
    """Time of a forward pass with the adapter off, on and merged."""

    unit: str = "ms"
    off: FiniteFloat | None = None
    on: FiniteFloat | None = None
    merged: FiniteFloat | None = None


class Energy(_Probe):
    """Energy of the whole run."""

    joules: Annotated[FiniteFloat | None, BeforeValidator(lambda v: None if v == UNMEASURED else v)] = None


class Probes(_Probe):
    """All probes of one row, means over its seeds; None where a probe was not run or not possible."""

    calibration: Calibration | None = None
    noise: Robustness | None = None
    corruptions: Robustness | None = None
    retention: Retention | None = None
    interpretability: Interpretability | None = None
    latency: Latency | None = None
    energy: Energy | None = None
    unmeasured: dict[str, str] = Field(default_factory=dict)


def probes(records: Sequence[RunRecord], costs: Sequence[RunRecord]) -> Probes:
    """Return the probes of the finished runs `records`; `latency` and `energy` of `costs` only.

    Raises:
        DataError: a probe's figures are not of the form that the report reads (run and field are named).
    """
    out: dict[str, Any] = {"unmeasured": {}}
    for name, kind in KINDS.items():
        runs = costs if name in ("latency", "energy") else records
        found = []
        for record in runs:
            data = record.probes.get(name)
            if data is None:
                continue
            if UNMEASURED in data and len(data) == 1:
                out["unmeasured"][name] = clean(str(data[UNMEASURED]))
                continue
            found.append(_read(kind, data, name, record).model_dump(mode="json"))
        if found:
            out[name] = mean(found)
    return Probes.model_validate(out)


KINDS: dict[str, type[_Probe]] = {
    "calibration": Calibration,
    "noise": Robustness,
    "corruptions": Robustness,
    "retention": Retention,
    "interpretability": Interpretability,
    "latency": Latency,
    "energy": Energy,
}


def wrong(record: RunRecord, probe: str, problem: str) -> DataError:
    """Return the error for a probe of `record` that cannot be read."""
    where = f"Run {record.key}, probe '{probe}'"
    return DataError(clean(f"{where}: {problem}"), "Correct the probe and run it again.")


def _read(kind: type[_Probe], data: dict[str, Any], name: str, record: RunRecord) -> _Probe:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise wrong(record, name, f"{field}: {first['msg']}.") from None


def mean(values: Sequence[Any]) -> Any:
    """Return the mean of equally built JSON values, number by number; of anything else the first.

    >>> mean([{"a": [1, 2], "b": "x"}, {"a": [3, None], "b": "x"}])
    {'a': [2.0, 2.0], 'b': 'x'}
    """
    known = [value for value in values if value is not None]
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
