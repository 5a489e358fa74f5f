"""The adviser's evidence: tables from records and from published results, the ranking model, and its own evaluation."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tools.evidence import make, regret
from tools.evidence.derive import study
from tools.evidence.published import ours, published

import invented
from peftree import registry
from peftree.advise.measures import forgetting, rate, step_time
from peftree.advise.rank import (
    ASSUMED,
    OTHER_FIELDS,
    OTHER_SITES,
    RELATIVE,
    Evidence,
    Query,
    against,
    likeness,
    nearness,
    shown,
)
from peftree.advise.table import FOLDER, Context, Measured, Table, known, read_table
from peftree.bench import intervals
from peftree.errors import DataError
from peftree.runs.record import RunRecord

ROOT = Path(__file__).parents[2]
QUERY = Query("language", "understanding", 100_000_000, 1000)


def context(**changes: Any) -> Context:
    """Return a task."""
    plain: dict[str, Any] = {
        "source": "here", "group": "a", "tier": "small", "modality": "language", "kind": "understanding",
        "metric": "accuracy", "model": "m", "parameters": 100_000_000, "rows": 1000, "steps": 10,
        "baseline": "head_only",
    }  # fmt: skip
    return Context(**plain | changes)


def row(task: str, method: str, relative: float, error: float = 0.02, **more: Any) -> Measured:
    """Return a result whose interval has that standard error."""
    ends = {"low": relative - 1.96 * error, "high": relative + 1.96 * error}
    return Measured(task=task, method=method, relative=relative, gain=relative, seeds=5, **ends, **more)


def table(contexts: dict[str, Context], rows: list[Measured]) -> Table:
    """Return a table."""
    return Table(origin="invented", contexts=contexts, results=tuple(rows))


def world(tasks: int, methods: dict[str, float], noise: float = 0.05, seed: int = 0) -> Table:
    """Return tasks of groups of their own on which methods have true means with noise between tasks."""
    draw = np.random.default_rng(seed)
    contexts = {f"t{i}": context(group=f"t{i}") for i in range(tasks)}
    rows = [row(t, m, float(mean + draw.normal(0, noise))) for t in contexts for m, mean in methods.items()]
    return table(contexts, rows)


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    """An invented study."""
    return invented.study()


def test_a_study_becomes_a_table_of_its_final_runs(records: list[RunRecord]) -> None:
    found = study(records)
    assert set(found.contexts) == {t["task"] for t in invented.STUDY}
    first = found.contexts["text-classification"]
    assert (first.modality, first.baseline, first.parameters) == ("language", "head_only", 22_700_000)
    rows = {r.method: r for r in found.results if r.task == "text-classification"}
    assert (rows["full"].relative or 0) > 0.9 and rows["head_only"].gain == 0.0
    mine = [r for r in records if (r.task, r.method, r.phase) == ("text-classification", "houlsby", "final")]
    score = float(np.mean([r.score for r in mine if r.score is not None]))
    assert rows["houlsby"].score == pytest.approx(score, rel=1e-3)
    assert rows["lora"].times == pytest.approx(1e-3 / registry.get("lora").tags.lr, rel=1e-3)
    assert rows["lora"].fields == {}, "r=8 is the default and says nothing"
    assert rows["houlsby"].time == pytest.approx((0.1 + 0.15 * 0.42) / (0.1 + 0.15), rel=1e-3)


def test_the_relative_score_is_the_gain_in_units_of_the_best_gains(records: list[RunRecord]) -> None:
    for task, sign in (("text-classification", 1), ("text-generation", -1)):
        rows = [r for r in study(records).results if r.task == task]
        unit = float(np.mean(sorted((r.gain or 0.0 for r in rows), reverse=True)[:3]))
        final = [r for r in records if r.task == task and r.phase == "final"]
        m, b = (np.array([r.items for r in final if r.method == n]) for n in ("ia3", "head_only"))
        gap = intervals.difference(m, b)
        ends = sorted((sign * gap.low / unit, sign * gap.high / unit))
        found = next(r for r in rows if r.method == "ia3")
        assert found.relative == pytest.approx(sign * gap.value / unit, rel=1e-2) and 0.5 < found.relative < 0.95
        assert (found.low, found.high) == (pytest.approx(ends[0], rel=1e-2), pytest.approx(ends[1], rel=1e-2))
        assert next(r for r in rows if r.method == "head_only").relative == 0.0


def test_poor_full_fine_tuning_changes_no_other_figure(records: list[RunRecord]) -> None:
    """Where full fine-tuning gains little, shares of its gain have no interval; units of the best gains do."""
    task = [r for r in records if r.task == "text-classification"]
    head = {r.seed: r for r in task if r.method == "head_only" and r.phase == "final"}

    def poor(r: RunRecord) -> RunRecord:
        other = head[r.seed]
        return r.model_copy(update={"items": other.items, "score": other.score})

    changed = [poor(r) if (r.method, r.phase) == ("full", "final") else r for r in task]
    before, after = ({r.method: r for r in study(found).results} for found in (task, changed))
    assert after["full"].relative == 0.0 and (before["full"].relative or 0) > 0.9
    assert after["lora"].relative == pytest.approx(before["lora"].relative, abs=0.05)


def test_where_nothing_gains_there_are_no_relative_scores(records: list[RunRecord]) -> None:
    task = [r for r in records if r.task == "text-classification" and r.phase == "final"]
    head = {r.seed: r for r in task if r.method == "head_only"}
    flat = [r.model_copy(update={"items": head[r.seed].items, "score": head[r.seed].score}) for r in task]
    assert all(r.relative is None for r in study(flat).results)


def test_losses_gain_when_they_fall_and_perplexity_counts_in_logs(records: list[RunRecord]) -> None:
    rows = {r.method: r for r in study(records).results if r.task == "text-generation"}
    full = [r.items for r in records if (r.task, r.method, r.phase) == ("text-generation", "full", "final")]
    head = [r.items for r in records if (r.task, r.method, r.phase) == ("text-generation", "head_only", "final")]
    assert rows["full"].gain == pytest.approx(float(np.mean(head) - np.mean(full)), rel=1e-3) and rows["full"].gain > 0


def test_what_is_forgotten_is_positive_whatever_was_measured(records: list[RunRecord]) -> None:
    found = study(records)
    assert found.contexts["text-classification"].forgetting.startswith("loss of knn accuracy")
    assert found.contexts["text-generation"].forgetting.startswith("rise of the loss")
    for task, sign in (("text-classification", 1), ("text-generation", -1)):  # the probe's change: accuracy, nats
        raw = [r.probes["retention"]["change"] for r in records if (r.task, r.method) == (task, "lora") and r.probes]
        mine = next(r for r in found.results if (r.task, r.method) == (task, "lora"))
        assert mine.forgets == pytest.approx(-sign * raw[0], rel=1e-3)


def test_diverged_runs_are_counted_and_gain_nothing(records: list[RunRecord]) -> None:
    bad = {"status": "diverged", "error": "not finite", "score": None, "items": ()}
    changed = [r.model_copy(update=bad) if (r.method, r.phase, r.seed) == ("lora", "final", 1) else r for r in records]
    found = next(r for r in study(changed).results if (r.task, r.method) == ("text-classification", "lora"))
    assert (found.seeds, found.diverged) == (2, 1)
    point = next(p for p in Evidence((study(changed),)).points if p.row is found or p.row == found)
    assert point.y == pytest.approx(2 / 3 * (found.relative or 0), rel=1e-6)


def test_without_final_runs_there_is_no_evidence(records: list[RunRecord]) -> None:
    with pytest.raises(DataError, match="no final runs"):
        study([r for r in records if r.phase == "trial"])
    other = [r.model_copy(update={"data": "e" * 64}) for r in records]
    with pytest.raises(DataError, match="two sets of data"):
        study([*records, *other])


def test_a_table_comes_back_from_its_file(records: list[RunRecord], tmp_path: Path) -> None:
    made = study(records)
    (tmp_path / "a.json").write_text(make.written(made))
    assert read_table(tmp_path / "a.json") == made
    (tmp_path / "b.json").write_text('{"origin": 3}')
    with pytest.raises(DataError, match=r"b\.json is not a table"):
        read_table(tmp_path / "b.json")


def test_the_shipped_tables_name_methods_and_fields_that_exist() -> None:
    assert known()
    for each in known():
        for r in each.results:
            registry.make(r.method, dict(r.fields))
    assert {p.name for p in FOLDER.glob("*.json")} >= {"peft.json"}


def theirs(kind: str | None, score: float, lr: float = 1e-4, **config: Any) -> dict[str, Any]:
    """Return a result file in the form that Hugging Face PEFT publishes."""
    last = {"step": 100, "test accuracy": score, "train samples": 400, "forgetting": 0.1 * score}
    return {
        "run_info": {
            "train_config": {"model_id": "m", "optimizer_type": "AdamW", "optimizer_kwargs": {"lr": lr}},
            "peft_config": {"peft_type": kind, **config} if kind else None,
        },
        "train_info": {
            "status": "success", "metrics": [last], "num_total_params": 10, "num_trainable_params": 1,
            "train_time": 200.0 * score,
        },
    }  # fmt: skip


def test_published_results_become_a_table() -> None:
    qv = ["q_proj", "v_proj"]
    runs = [
        theirs(None, 0.5), theirs("LORA", 0.4, r=8, lora_alpha=16, target_modules=qv),
        theirs("LORA", 0.45, lr=1e-3, r=8, lora_alpha=16, target_modules=qv),
        theirs("LORA", 0.48, r=8, lora_alpha=16, target_modules=qv, use_bdlora={"a": 1}),
        theirs("LORA", 0.49, r=8, lora_alpha=16, target_modules=qv, init_lora_weights="mica"),
        theirs("WAVEFT", 0.5, n_frequency=8),
    ]  # fmt: skip
    fa = theirs("LORA", 0.9, r=8, lora_alpha=16, target_modules=qv)
    fa["run_info"]["train_config"]["optimizer_type"] = "lora-fa"
    found = published("abc", {"MetaMathQA": [*runs, fa]})
    rows = {r.key: r for r in found.results}
    assert set(rows) == {"full", "lora"}, "variants that are none of ours are left out"
    lora = rows["lora"]
    value = 0.45 / 0.475  # the unit is the mean of the best gains, here of the two there are
    assert (lora.score, lora.times) == (0.45, 1e-3 / registry.get("lora").tags.lr)
    error = math.sqrt(0.45 * 0.55 / 1319) / 0.475
    assert lora.relative == pytest.approx(value, abs=1e-4) and lora.time == pytest.approx(0.9)
    assert lora.low == pytest.approx(value - 1.96 * error, abs=1e-3)
    assert "abc" in found.origin
    with pytest.raises(DataError, match="lack"):
        published("abc", {"MetaMathQA": runs[1:]})


def test_their_configurations_find_ours() -> None:
    targets = ["gate_proj", "up_proj", "down_proj"]
    named = ours({"peft_type": "LORA", "r": 10, "lora_alpha": 20, "target_modules": targets})
    assert named == ("lora", {"alpha": 20.0, "r": 10, "sites": "ffn.up ffn.gate ffn.down"})
    assert ours({"peft_type": "OFT", "r": 32, "target_modules": ["q_proj", "v_proj"]}, 3072) == ("oft", {"block": 96})
    assert ours({"peft_type": "OFT", "r": 32, "target_modules": ["q_proj", "v_proj"]}) is None
    assert ours({"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"]}) == ("ia3", {})
    assert ours({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["unknown"]}) is None
    assert ours({"peft_type": "WAVEFT"}) is None


def test_without_evidence_the_estimate_is_the_prior_and_unknown() -> None:
    found = Evidence((world(4, {"lora": 0.9, "ia3": 0.7, "bitfit": 0.5}),))
    mu, sigma, tau = found.spread
    estimate = found.estimate(QUERY, "houlsby", {})
    assert not estimate.known and estimate.value == pytest.approx(mu)
    assert estimate.high - estimate.value == pytest.approx(1.96 * math.hypot(sigma, tau))


def test_much_evidence_moves_the_estimate_to_its_mean_and_little_does_not() -> None:
    many = Evidence((world(20, {"lora": 1.0, "ia3": 0.6, "bitfit": 0.5}, noise=0.2),))
    few = Evidence((world(2, {"lora": 1.0, "ia3": 0.6, "bitfit": 0.5}, noise=0.2, seed=3),))
    of_many = np.mean([r.relative for r in many.tables[0].results if r.method == "lora" and r.relative])
    assert many.estimate(QUERY, "lora").value == pytest.approx(float(of_many), abs=0.03)
    assert many.estimate(QUERY, "lora").error < few.estimate(QUERY, "lora").error
    assert shown(many.estimate(QUERY, "lora"), many.estimate(QUERY, "bitfit"))
    assert not shown(many.estimate(QUERY, "ia3"), many.estimate(QUERY, "ia3"))


def test_the_interval_covers_a_new_task() -> None:
    truth = {"lora": 1.0, "houlsby": 0.9, "ia3": 0.8, "bitfit": 0.75, "vera": 0.7, "dora": 0.95}
    inside = []
    for seed in range(40):
        evidence = Evidence((world(6, truth, noise=0.15, seed=seed),))
        new = np.random.default_rng(1000 + seed)
        for method, mean in truth.items():
            e, y = evidence.estimate(QUERY, method), mean + new.normal(0, 0.15)
            inside.append(e.low <= y <= e.high)
    assert 0.9 <= np.mean(inside) <= 0.99


def test_nearer_tasks_weigh_more() -> None:
    contexts = {"near": context(group="n"), "far": context(group="f", modality="vision", kind="generation")}
    methods = {"near": {"lora": 1.0, "ia3": 0.4, "vera": 0.7}, "far": {"lora": 0.4, "ia3": 1.0, "vera": 0.7}}
    rows = [row(t, m, v) for t, found in methods.items() for m, v in found.items()]
    evidence = Evidence((table(contexts, rows),))
    here, there = QUERY, Query("vision", "generation", 100_000_000, 1000)
    assert evidence.estimate(here, "lora").value > evidence.estimate(here, "ia3").value
    assert evidence.estimate(there, "lora").value < evidence.estimate(there, "ia3").value
    assert evidence.estimate(here, "lora").measured[0] == "near"
    plain = Evidence(evidence.tables, plain=True)
    assert plain.estimate(here, "lora").value == pytest.approx(plain.estimate(here, "ia3").value)
    assert nearness(here, contexts["near"]) == 1.0 > nearness(here, context(parameters=10_000_000_000))


def test_tasks_on_the_same_data_share_one_vote() -> None:
    methods = {"lora": 1.0, "ia3": 0.5, "vera": 0.7}
    apart = {f"t{i}": context(group=f"t{i}") for i in range(4)}
    alike = {f"t{i}": context(group="one") for i in range(4)}
    one = {"t0": context(group="t0")}
    errors = []
    for contexts in (apart, alike, one):
        found = Evidence((table(contexts, [row(t, m, v) for t in contexts for m, v in methods.items()]),))
        found.__dict__["spread"] = (0.7, ASSUMED, ASSUMED)  # the same for all three
        errors.append(found.estimate(QUERY, "lora").error)
    assert errors[0] < errors[1] and errors[1] == pytest.approx(errors[2], rel=0.05)


def test_other_settings_say_less() -> None:
    same, other, elsewhere = (row("t", "lora", 1.0, fields=f) for f in ({}, {"r": 32}, {"sites": "linear"}))
    assert (likeness("lora", {}, same), likeness("lora", {}, other)) == (1.0, OTHER_FIELDS)
    assert likeness("lora", {}, elsewhere) == OTHER_SITES
    assert likeness("rslora", {}, same) == RELATIVE and likeness("ia3", {}, same) == 0.0
    assert likeness("head_only", {}, row("t", "full", 1.0)) == 0.0, "a reference borrows from nothing"
    found = Evidence((table({"t": context()}, [same, elsewhere]),))
    assert found.estimate(QUERY, "lora", {"sites": "linear"}).exact
    assert not found.estimate(QUERY, "lora", {"sites": "linear", "r": 64}).exact
    assert found.estimate(QUERY, "lora").runs == 5, "one vote a task: the rows most like the candidate"


def test_scores_beyond_reason_are_cut_and_a_group_can_be_left_out() -> None:
    found = Evidence((table({"t": context()}, [row("t", "lora", -40.0), row("t", "ia3", 9.0)]),))
    assert [p.y for p in found.points] == [-1.0, 1.5]
    assert found.assumed and "t" not in {c.group for _, c in Evidence(found.tables, without="a").rows()}
    assert not Evidence(found.tables, without="a").points


def test_rates_times_and_forgetting_come_from_the_method_itself() -> None:
    contexts = {"t": context(source="our benchmark", forgetting="loss"), "u": context(group="u", forgetting="loss")}
    rows = [
        row("t", "full", 1.0, times=1.0, time=1.0, forgets=0.5),
        row("t", "lora", 1.0, times=4.0, time=0.5, forgets=0.1),
        row("t", "ia3", 0.5, times=9.0, time=0.3, forgets=0.2),
        row("u", "lora", 0.5, times=100.0, time=0.5),
        row("u", "ia3", 0.95, times=9.0),
    ]
    evidence = Evidence((table(contexts, rows),))
    lora = rate(evidence, QUERY, "lora", {})
    assert lora is not None and (lora.times, lora.tasks) == (pytest.approx(2.0), 1), "sqrt(4 x 1); a bad run tells none"
    both = rate(evidence, QUERY, "ia3", {})
    assert both is not None and both.tasks == 2 and both.times == pytest.approx(9 ** (2 / 3))
    assert rate(evidence, QUERY, "houlsby", {}) is None
    assert step_time(evidence, QUERY, "lora", {}) == pytest.approx(0.5)
    assert step_time(evidence, QUERY, "houlsby", {}) is None
    lost = forgetting(evidence, QUERY, "lora", {})
    assert lost is not None and lost.place == 0.0 and lost.measured == (("t", "loss", 0.1, 0.5),)
    worst = forgetting(evidence, QUERY, "full", {})
    assert worst is not None and worst.place == 1.0


def test_the_gap_to_full_fine_tuning_has_an_interval() -> None:
    found = Evidence((world(10, {"full": 1.0, "lora": 0.8, "ia3": 0.6, "vera": 0.5}, noise=0.1),))
    full, lora = found.estimate(QUERY, "full"), found.estimate(QUERY, "lora")
    gap, low, high = against(lora, full, found.spread[1])
    assert gap == pytest.approx(-0.2, abs=0.1) and low < gap < high
    assert high - gap == pytest.approx(1.96 * math.sqrt(lora.error**2 + full.error**2 + 2 * found.spread[1] ** 2))


METHODS = {"lora": 0.95, "houlsby": 0.9, "ia3": 0.6, "bitfit": 0.5, "vera": 0.4, "dora": 0.85, "oft": 0.3}


def test_where_tasks_agree_the_advice_loses_little() -> None:
    found = regret.evaluate(world(8, METHODS, noise=0.03))
    assert len(found) == 8
    top, random = (regret.mean(found, name) for name in ("advice_top", "random_top"))
    assert top is not None and random is not None and top < 0.02 < random
    assert all(r.advice >= r.advice_top >= 0 for r in found)
    lost = [1 - v / 0.95 for v in METHODS.values()]
    assert regret.mean(found, "random") == pytest.approx(float(np.mean(lost)), abs=0.03)


def test_a_task_is_advised_on_without_the_tasks_on_its_data() -> None:
    """Two tasks on the same data turn the order round: who saw one of them would know the other's."""
    opposite = {m: 1.35 - v for m, v in METHODS.items()}
    contexts = {f"t{i}": context(group=f"t{i}") for i in range(6)} | {k: context(group="odd") for k in ("x", "y")}
    rows = [row(f"t{i}", m, v) for i in range(6) for m, v in METHODS.items()]
    rows += [row(task, m, v) for task in ("x", "y") for m, v in opposite.items()]
    found = {r.task: r for r in regret.evaluate(table(contexts, rows))}
    assert found["x"].advice > 0.5 and found["x"].chosen[0] == "lora" and found["x"].best == "oft"
    assert found["t0"].advice < 0.05


def test_three_choices_are_three_methods() -> None:
    rows = [row("t", "lora", 1.0), row("t", "ia3", 0.5), row("t", "vera", 0.4)]
    rows.insert(1, row("t", "lora", 0.99, fields={"sites": "linear"}))
    evidence = Evidence((table({"t": context()}, rows),))
    assert regret.ranked(evidence, context(), rows)[:3] == ["lora", "ia3", "vera"]


def test_agreement_with_other_results_is_a_rank_correlation() -> None:
    mine = world(4, METHODS, noise=0.02)
    same = table({"p": context(group="p")}, [row("p", m, v) for m, v in METHODS.items()])
    turned = table({"p": context(group="p")}, [row("p", m, -v) for m, v in METHODS.items()])
    up, down = regret.agreement(mine, same), regret.agreement(mine, turned)
    assert up is not None and up[0] == pytest.approx(1.0) and up[1] == 7
    assert down is not None and down[0] == pytest.approx(-1.0)
    assert regret.agreement(mine, table({"p": context()}, [])) is None


@pytest.mark.slow
def test_tables_and_page_are_what_the_tool_makes() -> None:
    words = [sys.executable, "-m", "tools.evidence.make", "--check"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run `make study`\n{done.stderr}"


def test_the_tool_makes_table_and_figures_from_a_pack(
    records: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "advice.md"
    page.write_text(f"before\n{make.START}\nold\n{make.END}\nafter\n")
    folder = tmp_path / "records"
    folder.mkdir()
    for record in records:
        record.write(folder)
    monkeypatch.setattr(make, "PAGE", page)
    monkeypatch.setattr(make, "STUDY", tmp_path / "study.json")
    monkeypatch.setattr(sys, "argv", ["make.py", "--study", str(tmp_path)])
    assert make.main() == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| text-classification |" in text and "**mean of 6**" in text
    assert json.loads((tmp_path / "study.json").read_text())["contexts"]
