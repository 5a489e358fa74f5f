"""Probing: what is run, what continues, what stops it, and that what was done is not done again."""

from __future__ import annotations

import dataclasses
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from rich.console import Console

from peftree import registry
from peftree.advise import advice as advising
from peftree.advise import probe as probing
from peftree.advise.advice import Asked, advise
from peftree.advise.candidates import Candidate
from peftree.advise.probe import Arm, Pace, probe, rounds
from peftree.advise.show import render_probe
from peftree.advise.subset import pick, write_subset
from peftree.advise.table import Context, Measured, Table
from peftree.data.rows import Example, load_data
from peftree.errors import ConfigError
from peftree.runs.read import read_records
from peftree.runs.record import RunRecord
from train import tiny

METHODS = {"lora": 0.9, "bitfit": 0.85, "ia3": 0.8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny classifier's body with weights and tokenizer."""
    words = tiny.tokenizer()
    config = tf.BertConfig(vocab_size=len(words), max_position_embeddings=40, **tiny.SHAPE)
    return tiny.save("BertModel", config, tmp_path_factory.mktemp("model"), words)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with all splits."""
    folder = tmp_path_factory.mktemp("data")
    for split, n, seed in (("train", 64, 0), ("valid", 24, 1)):
        tiny.write_csv(folder / f"{split}.csv", tiny.reviews(n, seed))
    tiny.write_csv(folder / "test.csv", [("testword good", "pos"), ("testword bad", "neg")])
    return str(folder)


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three methods are known, and few tried."""
    plain: dict[str, Any] = {
        "source": "our benchmark", "group": "g", "tier": "small", "modality": "language", "kind": "understanding",
        "metric": "accuracy", "model": "other", "parameters": 0, "rows": 0, "steps": 1, "baseline": "head_only",
    }  # fmt: skip
    rows = tuple(
        Measured(task="t", method=m, seeds=2, relative=v, low=v - 0.02, high=v + 0.02) for m, v in METHODS.items()
    )
    made = Table(origin="invented", contexts={"t": Context(**plain)}, results=rows)
    monkeypatch.setattr(advising, "known", lambda: (made,))
    monkeypatch.setattr(probing, "MOST", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("_few")
def test_a_probe_measures_on_the_users_rows_and_goes_on_where_it_was(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(model=model, data=data, memory=1 << 30, top=2)
    advice = advise(asked)
    said: list[str] = []
    found = probe(asked, advice, 300.0, tmp_path / "probe", said.append)
    assert {t.candidate.method for t in found.tried} == {r.judged.candidate.method for r in advice.recommended}
    assert found.rows == 24 and found.metric == "accuracy" and found.before is not None
    assert found.tried[0].verdict == "best" and found.tried[0].score is not None
    assert all(t.steps == 12 for t in found.tried), "three passes over 64 rows, 16 a step"
    scores = [t.score for t in found.tried]
    assert scores == sorted(scores, key=lambda s: -(s or 0)) and found.spent < 300
    records = {(r.method, r.steps): r for r in read_records(tmp_path / "probe" / "records")}
    assert len(records) == 3 == found.runs, "one to measure the pace, and two"
    for t in found.tried:
        record = records[t.candidate.method, 12]
        assert (record.score, len(record.items)) == (t.score, 24) and t.run["lr"] == record.learning_rate
    assert any("steps; about" in words for words in said)
    kept = "".join(p.read_text() for p in (tmp_path / "probe" / "data").glob("*"))
    assert "testword" not in kept and "good" in kept

    monkeypatch.setattr(probing, "run_cells", lambda *_, **__: pytest.fail("ran again"))
    again = probe(asked, advice, 300.0, tmp_path / "probe", said.append)
    assert [(t.candidate, t.score) for t in again.tried] == [(t.candidate, t.score) for t in found.tried]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_probe(again))
    text = console.export_text()
    assert "on 24 validation rows" in text and "best" in text and "one seed each" in text
    json.dumps(dataclasses.asdict(again), default=str)


def test_rounds_share_the_time_and_drop_candidates_where_there_is_little() -> None:
    pace = Pace(2.0, 0.1)
    (first, second) = rounds(pace, 120.0, 9, 1000)
    assert first[0] == 9 and second == (3, 180)
    assert first[0] * (2.0 + first[1] * 0.1) <= 60.0 and second[0] * (2.0 + second[1] * 0.1) <= 60.0
    assert rounds(pace, 120.0, 3, 1000) == [(3, 380)]
    assert rounds(pace, 30.0, 9, 1000)[0][0] < 9
    assert rounds(pace, 1e6, 9, 50) == [(9, 50)], "no second round where the first reached the end"
    with pytest.raises(ConfigError, match=r"too short: a run of 8 steps takes 3 s.*Give --probe at least 1min"):
        rounds(pace, 4.0, 9, 1000)


def arm(name: str, number: int) -> Arm:
    """Return a candidate's run."""
    return Arm(Candidate(name, {}), {"batch_size": 16, "lr": 0.1 + number})


def test_the_pace_is_that_of_the_dearest_run() -> None:
    runs = [record("lora", 10, 0.5), record("ia3", 20, 0.5)]
    assert probing.pace(runs) == Pace(3.0, pytest.approx(0.1))
    assert probing.pace(runs, 2) == Pace(2.5, pytest.approx(0.1)), "it scored the untrained model too"


NAMES = ["lora", "dora", "ia3", "bitfit", "vera", "oft", "ssf", "houlsby", "pfeiffer"]
ARMS = [arm(name, i) for i, name in enumerate(NAMES)]


def record(method: str, steps: int, hits: float, status: str = "ok", error: str = "", **more: Any) -> RunRecord:
    """Return a run that got this share of 100 rows right, the same rows first."""
    items = tuple(float(i < round(100 * hits)) for i in range(100))
    fine = {"score": float(np.mean(items)), "items": items} if status == "ok" else {"error": error}
    seconds = {"setup_seconds": 1.0, "train_seconds": 0.1 * steps, "eval_seconds": 1.0} if status == "ok" else {}
    return RunRecord(
        suite="probe", task="text-classification", dataset="d", model="m", modality="language", kind="understanding",
        method=method, branch=registry.get(method).tags.branch, seed=0, metric="accuracy", status=status,
        budget={"steps": steps}, steps=steps if status == "ok" else None, learning_rate=0.1, started=datetime.now(UTC),
        phase="trial", **fine, **seconds, **more,
    )  # fmt: skip


class Script(probing._Runner):
    """A runner whose runs are written down."""

    def __init__(self, folder: Path, hits: dict[str, float], failing: dict[tuple[str, int], str] | None = None) -> None:
        self.out, self.spent, self.runs, self.spend = folder, 0.0, 0, 120.0
        self.subset = probing.Subset("t", "v", 100_000, 100, "x")
        self.asked = Asked(model="m", data="d", memory=1)
        self.hits, self.failing, self.done = hits, failing or {}, list[tuple[str, int]]()

    def run(self, arm: Arm, steps: int, *, base: bool = False, limit: float = 0.0) -> RunRecord | None:
        """Return a record: a method gets better with its steps."""
        name = arm.candidate.method
        self.done.append((name, steps))
        self.runs += 1
        self.spent += 3.0
        later = self.failing.get((name, 0 if steps < 60 else 1))
        if later == "time":
            return None
        if later:
            return record(name, steps, 0.0, later, f"trace\n{name} went wrong")
        return record(name, steps, self.hits[name] + (0.1 if steps > 60 else 0.0), base_score=0.2 if base else None)


def test_the_best_third_goes_on_to_more_steps(tmp_path: Path) -> None:
    hits = {name: 0.2 + 0.05 * i for i, name in enumerate(NAMES)}
    runner = Script(tmp_path, hits)
    found = probing._halve(runner, ARMS, 120.0)
    steps = sorted({s for _, s in runner.done})
    assert len(runner.done) == 1 + 9 + 3 and len(steps) == 3
    assert {n for n, s in runner.done if s == steps[2]} == {"pfeiffer", "houlsby", "ssf"}
    assert [t.candidate.method for t in found.tried[:4]] == ["pfeiffer", "houlsby", "ssf", "oft"]
    assert [t.verdict for t in found.tried[:4]] == ["best", "worse", "worse", "fewer steps"]
    assert found.tried[0].score == pytest.approx(0.7) and found.before == 0.2
    assert found.tried[0].low is not None and found.tried[0].low < 0.7 < (found.tried[0].high or 0)


def test_what_is_not_apart_is_said_to_be_so(tmp_path: Path) -> None:
    found = probing._halve(Script(tmp_path, dict.fromkeys(NAMES, 0.5)), ARMS[:3], 120.0)
    assert [t.verdict for t in found.tried] == ["best", "no difference shown", "no difference shown"]


def test_failures_are_named_and_come_last_and_a_late_one_keeps_its_first_score(tmp_path: Path) -> None:
    hits = {name: 0.2 + 0.05 * i for i, name in enumerate(NAMES)}
    failing = {("lora", 0): "diverged", ("pfeiffer", 1): "failed", ("houlsby", 1): "time"}
    found = probing._halve(Script(tmp_path, hits, failing), ARMS, 120.0)
    last = found.tried[-1]
    assert (last.candidate.method, last.verdict, last.score) == ("lora", "diverged", None)
    assert last.text == "lora went wrong" and found.tried[0].candidate.method == "ssf"
    first = next(t for t in found.tried if t.candidate.method == "pfeiffer")
    assert first.verdict == "fewer steps" and first.score == pytest.approx(0.6)
    assert sum("did not finish" in note for note in found.notes) == 2
    everything = {("lora", 0): "failed", ("dora", 0): "failed", ("ia3", 0): "failed"}
    with pytest.raises(ConfigError, match=r"No run finished\. ia3: ia3 went wrong"):
        probing._halve(Script(tmp_path, hits, everything), ARMS[:3], 120.0)


def test_rounds_are_kept_for_the_same_time_and_data(tmp_path: Path) -> None:
    hits = dict.fromkeys(NAMES, 0.5)
    first, second = Script(tmp_path, hits), Script(tmp_path, hits)
    probing._halve(first, ARMS, 120.0)
    second.spent = 60.0  # slower than the first time: the runs are the same ones all the same
    probing._halve(second, ARMS, 120.0)
    assert first.done == second.done
    third = Script(tmp_path, hits)
    third.subset = dataclasses.replace(third.subset, sha256="y")
    third.spent = 50.0
    probing._halve(third, ARMS, 120.0)
    assert third.done != first.done


@pytest.mark.usefixtures("_few")
def test_ctrl_c_keeps_what_is_done(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    asked = Asked(model=model, data=data, memory=1 << 30)
    advice = advise(asked)
    monkeypatch.setattr(probing, "run_cells", stop)
    with pytest.raises(SystemExit) as end:
        probe(asked, advice, 60.0, tmp_path / "probe", lambda _: None)
    assert end.value.code == 130 and "the same command continues" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        probe(asked, advice, 60.0, tmp_path / "file", lambda _: None)


def test_a_subset_holds_every_class_and_is_the_same_each_time(tmp_path: Path) -> None:
    rows = [Example(f"row {i}", "rare" if i == 77 else "common", str(i)) for i in range(200)]
    few = pick(rows, 20, classes=True)
    assert len(few) == 20 and {r.target for r in few} == {"rare", "common"} and few == pick(rows, 20, classes=True)
    assert pick(rows, 500, classes=True) == rows and len(pick(rows, 20, classes=False)) == 20


def test_subsets_of_every_kind_of_data_are_read_back(tmp_path: Path) -> None:
    texts = load_data(tiny.write_csv(tmp_path / "a.csv", tiny.reviews(50)))
    numbers = load_data(
        tiny.write_csv(tmp_path / "b.csv", [(f"t{i}", str(i / 2)) for i in range(40)], ("text", "score"))
    )
    pairs = load_data(tiny.write_pairs(tmp_path / "pairs", 40), task="captioning")
    classes = tmp_path / "classes"
    for i, source in enumerate(sorted((tmp_path / "pairs").glob("*.png"))):
        target = classes / f"c{i % 2}" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    images = load_data(classes)
    for number, whole in enumerate((texts, numbers, pairs, images)):
        made = write_subset(whole, tmp_path / f"out{number}", train=12, valid=3)
        back = load_data(made.train, made.valid, task=whole.task)
        assert (len(back.train), len(back.valid)) == (made.rows, made.scored) == (12, 3)
        wanted, key = {r.target for r in whole.train}, {r.source for r in whole.train}
        assert {r.target for r in back.train} <= wanted and back.labels == whole.labels
        if whole.task.startswith("text"):
            assert {r.source for r in back.train} <= key
        assert write_subset(whole, tmp_path / f"out{number}", train=12, valid=3).sha256 == made.sha256
        assert write_subset(whole, tmp_path / f"more{number}", train=13, valid=3).sha256 != made.sha256
