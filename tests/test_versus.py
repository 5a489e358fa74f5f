"""One method against another over all tasks: what is shown, at what cost, and what is refused."""

from __future__ import annotations

import json

import pytest

from invented import HOSTILE, METHODS, TASKS, study
from peftree.bench.versus import versus
from peftree.errors import ConfigError, DataError
from peftree.runs.record import RunRecord


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    """Three tasks, five seeds, with trials."""
    chosen = [m for m in METHODS if m[0] in ("full", "head_only", "lora", "dora", "prompt_tuning", "molora")]
    return study(tasks=TASKS, methods=chosen, seeds=5, trials=2)


def test_a_worse_method_is_called_worse_on_every_task_at_its_cost(records: list[RunRecord]) -> None:
    found = versus(records, "prompt_tuning", "lora")
    assert [duel.judged for duel in found.duels] == ["worse"] * 3 and found.notes == ()
    assert all(duel.seeds == 5 and duel.p_holm < 0.05 and duel.p <= duel.p_holm for duel in found.duels)
    assert all(duel.share < 0 and len(duel.runs) == 10 for duel in found.duels)
    perplexity = next(duel for duel in found.duels if duel.metric == "perplexity")
    assert perplexity.difference.low > 0 and perplexity.a == pytest.approx(perplexity.b + perplexity.difference.value)
    assert (found.wilcoxon, found.sign, found.floor) == (0.25, 0.25, 0.25)
    assert found.costs["trainable parameters"] == pytest.approx(0.0006 / 0.012, rel=0.01)
    assert "prompt_tuning is worse than lora on 3 of 3 tasks" in found.sentence
    assert "cannot give less than 0.25" in found.sentence and "times the peak memory" in found.sentence


def test_the_other_way_round_everything_is_turned(records: list[RunRecord]) -> None:
    one, two = versus(records, "prompt_tuning", "lora"), versus(records, "lora", "prompt_tuning")
    assert {duel.judged for duel in two.duels} == {"better"} and two.wilcoxon == one.wilcoxon
    for a, b in zip(one.duels, two.duels, strict=True):
        assert a.difference.value == pytest.approx(-b.difference.value) and a.p == pytest.approx(b.p, abs=0.01)
    assert (one.costs["bytes on disk"] or 0) * (two.costs["bytes on disk"] or 0) == pytest.approx(1)


def test_equal_methods_show_no_difference_and_what_could_have_been_seen(records: list[RunRecord]) -> None:
    twin = [r.model_copy(update={"method": "twin"}) for r in records if r.method == "lora"]
    found = versus([*records, *twin], "twin", "lora")
    assert {duel.judged for duel in found.duels} == {"no difference shown"} and found.wilcoxon == 1.0
    assert all(duel.p == 1.0 and duel.difference.value == 0.0 for duel in found.duels)
    assert "No difference between twin and lora is shown on 3 tasks; smallest detectable" in found.sentence
    assert found.costs["peak memory"] == 1.0


def test_a_task_without_one_of_them_is_named_and_few_seeds_are_noted(records: list[RunRecord]) -> None:
    found = versus([r for r in records if r.seed != 4], "molora", "lora")
    assert len(found.duels) == 2
    assert "image-classification: no finished run of one of them; left out." in found.notes
    assert any("Fewer than 5 shared seeds" in note for note in found.notes)
    rest = [r for r in records if not (r.method == "dora" and r.task == "text-generation")]
    assert versus(rest, "dora", "lora").notes == ("text-generation: no runs of dora; left out.",)


def test_memory_and_time_of_two_environments_are_not_compared(records: list[RunRecord]) -> None:
    moved = [r.model_copy(update={"environment": {"machine": "x"}}) if r.method == "lora" else r for r in records]
    found = versus(moved, "dora", "lora")
    assert found.costs["peak memory"] is None and found.costs["processor time"] is None
    assert found.costs["trainable parameters"] is not None and "the same environment" in found.notes[-1]


def test_unknown_and_ambiguous_names_are_refused(records: list[RunRecord]) -> None:
    with pytest.raises(ConfigError, match="no run of 'lorra'") as error:
        versus(records, "lorra", "full")
    assert "Did you mean 'lora'?" in str(error.value)
    with pytest.raises(ConfigError, match="with itself"):
        versus(records, "lora", "lora")
    more = [r.model_copy(update={"fields": {"r": 32}}) for r in records if r.method == "lora"]
    assert versus([*records, *more], "lora r=32", "lora").duels  # r is 8 by default
    rest = [r.model_copy(update={"fields": {"r": 16}}) if r.method == "lora" else r for r in records]
    with pytest.raises(ConfigError, match="several settings") as error:
        versus([*rest, *more], "lora", "full")
    assert "lora r=16, lora r=32" in str(error.value)
    assert versus([*rest, *more], "lora r=32", "lora r=16").duels


def test_no_common_task_is_an_error(records: list[RunRecord]) -> None:
    apart = [r for r in records if (r.method, r.task) in {("lora", "text-generation"), ("dora", "text-classification")}]
    with pytest.raises(DataError, match="cannot be compared on any task"):
        versus(apart, "lora", "dora")
    trials = [r for r in records if r.phase == "trial"]
    with pytest.raises(DataError, match="no final runs"):
        versus(trials, "lora", "dora")


def test_text_and_json(records: list[RunRecord]) -> None:
    changed = [r.model_copy(update={"task": r.task + HOSTILE}) for r in records]
    found = versus(changed, "dora", "lora")
    text = found.to_text()
    assert "\x1b" not in text and "\u202e" not in text and text.count("p = ") == 4
    data = json.loads(found.to_json())
    assert data["sentence"] == found.sentence and set(data["duels"][0]["difference"]) == {"value", "low", "high"}
