"""The advice: candidates that fit, ranked for a goal by what was measured, each with its reasons and doubts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from pydantic import Field

from peftree.advise import cost as costs
from peftree.advise.candidates import Candidate, candidates
from peftree.advise.cost import Cost, Setting
from peftree.advise.measures import Forgetting, Rate, forgetting, rate, step_time
from peftree.advise.rank import Estimate, Evidence, Query, against, shown
from peftree.advise.rules import Rule, apply
from peftree.advise.serve import Serving, serving
from peftree.advise.settings import run_settings
from peftree.advise.situation import DataProfile, ModelProfile, data_profile, model_profile
from peftree.advise.table import known
from peftree.data.rows import Data
from peftree.data.thinning import rows_of
from peftree.errors import ConfigError, MethodError, PeftreeError, SiteError, did_you_mean
from peftree.named_method import make_method
from peftree.plan import Request
from peftree.settings import DataConfig, RunConfig

Goal = Literal["quality", "memory", "speed", "retention", "serving"]
GOALS: tuple[str, ...] = get_args(Goal)
TOP = 3
KEPT = {"memory", "device"}  # of a plan's settings that no run has, those that advice follows
# How much less than the best expected quality a candidate may have for each goal.
GIVE = {"quality": math.inf, "memory": 0.1, "speed": 0.1, "retention": 0.2, "serving": 0.1}
Told = Callable[[str], None]


class Asked(Request):
    """The question for advice: a run whose method is open; model and data decide whatever else it leaves open."""

    data: DataConfig = Field(description="where the rows are")
    goal: str = Field("quality", description="quality, memory, speed, retention or serving")
    top: int = Field(TOP, ge=1, description="how many methods to recommend")


@dataclass(frozen=True)
class Judged:
    """A candidate with what the evidence says about it, and its `cost` once it was planned.

    `against` is its expected relative score minus full fine-tuning's, with the interval of a new task; None: one of the
    two is unknown.
    """

    candidate: Candidate
    estimate: Estimate
    forgets: Forgetting | None
    time: float | None
    serving: Serving
    rate: Rate | None
    against: tuple[float, float, float] | None = None
    cost: Cost | None = None


@dataclass(frozen=True)
class Recommendation:
    """One recommendation.

    Attributes:
        judged: the candidate, its evidence and cost.
        why: the reasons, as sentences.
        separable: whether the evidence separates its quality from that of the first; None for the first.
        run: the settings of its `run.yaml`.
    """

    judged: Judged
    why: tuple[str, ...]
    separable: bool | None
    run: dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """The whole answer.

    Attributes:
        recommended: best first.
        misfits: label -> why a better-ranked candidate is not recommended.
        others: the rest, in the order of the evidence; they were not planned.
        rules: the rules that apply.
        notes: sentences for the reader.
        origins: where the evidence comes from.
    """

    asked: Asked
    model: ModelProfile
    data: DataProfile
    setting: Setting
    recommended: tuple[Recommendation, ...]
    misfits: dict[str, str]
    others: tuple[Judged, ...]
    rules: tuple[Rule, ...]
    notes: tuple[str, ...]
    origins: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        plain = asdict(self) | {"asked": self.asked.model_dump(mode="json")}
        plain |= {"rules": [r.model_dump(mode="json") for r in self.rules]}
        for one, row in zip(self.recommended, plain["recommended"], strict=True):
            found = one.judged.cost
            row["judged"]["cost"]["plan"] = found.plan.to_dict() if found else None
            row["judged"]["label"] = one.judged.candidate.label
        return plain


def check_goal(goal: str) -> None:
    """Raise ConfigError for an unknown goal."""
    if goal not in GOALS:
        raise ConfigError(f"There is no goal '{goal}'.", did_you_mean(goal, GOALS, "Goals"))


def look(asked: Asked) -> tuple[ModelProfile, DataProfile, Setting, Data]:
    """Return what is known about model and data; everything is checked before any work.

    Raises:
        ConfigError: the goal or task is unknown, a setting cannot be kept, a field is wrong, no config exists,
            the model does not take the length, or the budget is below the weights.
        DataError: the data do not parse.
    """
    check_goal(asked.goal)
    _check_kept(asked)
    make_method(asked)
    data = rows_of(asked)
    model = model_profile(asked.model, data.task, len(data.labels), asked.image_size or 0, asked.config)
    profile = data_profile(asked.data.train, data, asked.model)
    how = costs.setting(model, profile, asked)
    return model, profile, how, data


def _check_kept(asked: Asked) -> None:
    """Raise ConfigError for a setting of a plan that a run file cannot hold: advice would have to drop it."""
    for name in sorted(asked.model_fields_set & (set(Request.model_fields) - set(RunConfig.model_fields) - KEPT)):
        raise ConfigError(
            f"{asked.where(name)}{name}: a run has no such setting, so advice cannot keep it.",
            "Leave it out; `peftree plan` takes it.",
        )


def advise(asked: Asked, told: Told = lambda _: None) -> Advice:
    """Return the advice.

    Args:
        asked: the question.
        told: called with what is being worked on.

    Raises:
        PeftreeError: as for `look`, or nothing fits the budget.
    """
    model, data, how, _ = look(asked)
    evidence = Evidence(known())
    query = Query(data.modality, data.kind, model.parameters, data.rows)
    told("reading the evidence")
    judged = [judge(evidence, query, c, data.task) for c in candidates(evidence.tables)]
    kept, below = _worth(judged, asked.goal)
    chosen, misfits, asked_of = _fitting(ordered(kept, asked.goal), asked, data, how, told)
    if not chosen:
        raise _nothing_fits(asked, misfits, asked_of)
    first = chosen[0]
    recommended = tuple(
        Recommendation(
            j, reasons(j, asked.goal, evidence), None if j is first else shown(first.estimate, j.estimate),
            run_settings(asked, data, j.candidate, how, _costed(j), j.rate),
        )
        for j in chosen
    )  # fmt: skip
    taken = {j.candidate.label for j in chosen} | set(misfits)
    others = tuple(j for j in [*ordered(kept, asked.goal), *below] if j.candidate.label not in taken)
    rules = apply([j.candidate.method for j in chosen], data.modality, data.kind, data.rows)
    return Advice(
        asked, model, data, how, recommended, misfits, others, rules,
        (*left_open(asked), *notes(recommended, evidence, query)), tuple(t.origin for t in evidence.tables),
    )  # fmt: skip


def judge(evidence: Evidence, query: Query, candidate: Candidate, task: str) -> Judged:
    """Return a candidate with what the evidence says about it."""
    words = (evidence, query, candidate.method, candidate.fields)
    mine, full = evidence.estimate(*words[1:]), evidence.estimate(query, "full")
    gap = against(mine, full, evidence.spread[1]) if mine.known and full.known else None
    return Judged(
        candidate, mine, forgetting(*words), step_time(*words), serving(candidate, task), rate(*words), gap,
    )  # fmt: skip


def _worth(judged: Sequence[Judged], goal: str) -> tuple[list[Judged], list[Judged]]:
    """Split the candidates by whether their expected quality is close enough to the best for the goal."""
    best = max((j.estimate.value for j in judged if j.estimate.known), default=0.0)
    near = [j for j in judged if j.estimate.value >= best - GIVE[goal]]
    return near, [j for j in judged if j.estimate.value < best - GIVE[goal]]


def ordered(judged: Sequence[Judged], goal: str) -> list[Judged]:
    """Return the candidates in the order of the goal, as far as known without the planner; unknown ones come last."""

    def place(j: Judged) -> tuple[float, ...]:
        unknown, value = float(not j.estimate.known), -j.estimate.value
        if goal == "speed":
            return (unknown, float(j.time is None), j.time or 0.0, value)
        if goal == "retention":
            return (unknown, float(j.forgets is None), j.forgets.place if j.forgets else 0.0, value)
        if goal == "serving":
            return (unknown, -float(j.serving.rank), value)
        return (unknown, value)

    order = sorted(judged, key=place)
    return _full_behind(order) if goal == "quality" else order


def _full_behind(order: Sequence[Judged]) -> list[Judged]:
    """Put full fine-tuning, which costs most, after every candidate that the evidence does not separate from it."""
    full = next((j for j in order if j.candidate.method == "full"), None)
    if full is None:
        return list(order)
    rest = [j for j in order if j is not full]
    ahead = [i for i, j in enumerate(rest) if j.estimate.known and not shown(j.estimate, full.estimate)]
    at = max(ahead, default=-1) + 1 if ahead else order.index(full)
    return [*rest[:at], full, *rest[at:]]


def _fitting(
    order: Sequence[Judged], asked: Asked, data: DataProfile, how: Setting, told: Told
) -> tuple[list[Judged], dict[str, str], list[Cost]]:
    """Return the first candidate of each method that fits, why others do not, and all that was planned.

    For the goal memory, all candidates are planned, and those that take least come first.
    """
    found: list[Judged] = []
    misfits: dict[str, str] = {}
    planned: list[Cost] = []
    for one in order:
        if asked.goal != "memory" and len({j.candidate.method for j in found}) >= asked.top:
            break
        if asked.goal != "memory" and one.candidate.method in {j.candidate.method for j in found}:
            continue
        told(f"planning {one.candidate.label}")
        try:
            request = costs.request(asked, data, how, one.candidate.method, one.candidate.fields)
            cost = costs.cost(request, asked.memory)
        except (SiteError, MethodError) as error:
            misfits[one.candidate.label] = f"does not apply: {error.what}"
            continue
        planned.append(cost)
        if cost.fits:
            found.append(replace(one, cost=cost))
        else:
            misfits[one.candidate.label] = f"takes at least {costs.size(cost.plan.expected)}"
    if asked.goal == "memory":
        found.sort(key=lambda j: _leanness(_costed(j)))
        found = list({j.candidate.method: j for j in reversed(found)}.values())[::-1]
    chosen = found[: asked.top]
    for one in chosen:
        told(f"looking for the largest batch of {one.candidate.label}")
    return [replace(j, cost=costs.with_largest(_costed(j), asked.memory)) for j in chosen], misfits, planned


def _leanness(cost: Cost) -> tuple[bool, int, int]:
    return cost.checkpointing, -cost.batch, cost.plan.expected


def _costed(judged: Judged) -> Cost:
    assert judged.cost is not None
    return judged.cost


def _nothing_fits(asked: Asked, misfits: Mapping[str, str], planned: Sequence[Cost]) -> PeftreeError:
    if not planned:
        first = next(iter(misfits.items()), ("no method", "there is none"))
        return ConfigError(f"No candidate applies to {asked.model}: {first[0]} {first[1]}.", "Choose another model.")
    least = min(c.plan.expected for c in planned)
    return ConfigError(
        f"Nothing fits {costs.size(asked.memory)}: the smallest candidate takes {costs.size(least)} "
        "with one row at a time and gradient checkpointing.",
        f"Give {costs.size(least * 1.05)}, or use shorter rows (max_length) or a smaller model.",
    )


def reasons(judged: Judged, goal: str, evidence: Evidence) -> tuple[str, ...]:
    """Return the reasons, as sentences."""
    e = judged.estimate
    if not e.known:
        said = ["quality unknown: it was not measured"]
    else:
        whose = " and ".join(e.sources)
        said = [
            f"expected quality {e.value:.2f} [{e.low:.2f}, {e.high:.2f}] of what the best methods gain, "
            f"from {e.tasks} task{'s' * (e.tasks != 1)} and {e.runs} run{'s' * (e.runs != 1)} ({whose})"
        ]
        if judged.against is not None and judged.candidate.method != "full":
            gap, low, high = judged.against
            said.append(f"against full fine-tuning {gap:+.2f} [{low:+.2f}, {high:+.2f}] in the same units")
        if not e.exact:
            said.append("these exact settings were not measured: the figure rests on other settings of the method")
        c = evidence.contexts[e.measured[0]]
        said.append(f"nearest evidence: {e.measured[0]} ({c.model}, {c.modality} {c.kind}, tier {c.tier})")
    if goal == "speed" and judged.time is None:
        said.append("the time of its step was not measured; operations do not predict it")
    if judged.forgets is not None:
        said.append(f"forgets more than {judged.forgets.place:.0%} of the methods measured with it")
    return tuple(said)


def left_open(asked: Asked) -> list[str]:
    """Return what the run says but advice does not follow, as a sentence or none."""
    named = [asked.method.name] if "method" in asked.model_fields_set else []
    named += [f"lr={asked.lr:g}"] if asked.lr is not None else []
    said = "advice chooses the method and its learning rate: what the run says about them is ignored"
    return [f"{said} ({', '.join(named)})"] if named else []


def notes(recommended: Sequence[Recommendation], evidence: Evidence, query: Query) -> tuple[str, ...]:
    """Return remarks on the advice as a whole."""
    said = []
    tied = [r.judged.candidate.label for r in recommended if r.separable is False]
    first = recommended[0].judged
    if tied:
        said.append(f"no difference shown in quality between {first.candidate.label} and {', '.join(tied)}")
    near = {c.group for _, c in evidence.rows() if (c.modality, c.kind) == (query.modality, query.kind)}
    if not near:
        said.append(f"no evidence on {query.modality} {query.kind}: all of it is from other kinds of tasks")
    said.append("all evidence is from other models and data than yours; --probe measures on yours")
    sigma, whence = evidence.spread[1], " (assumed: too few tasks)" if evidence.assumed else ""
    said.append(f"a method's relative score varies by {sigma:.2f} (standard deviation) from task to task{whence}")
    said.append("full fine-tuning ranks after all that the evidence does not separate from it, since it costs most")
    return tuple(said)
