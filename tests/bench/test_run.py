"""A whole suite on a tiny model: trials choose the rate, fresh seeds are scored, everything resumes and is recorded."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from demo import tiny
from peftree.bench import cell, command, sources
from peftree.bench.run import Choice, run_suite, states
from peftree.bench.sources import Material, folder_hash
from peftree.bench.suite import Suite, SuiteTask
from peftree.errors import AssetError, ConfigError, DataError, DivergedError
from peftree.runs.read import read_records, read_results
from peftree.runs.record import RunRecord, file_name

SIZES = {"train": 24, "valid": 6, "test": 9}


def suite(root: Path, **task: object) -> Suite:
    source = {"source": "files", "path": str(root / "data")}
    reviews = {
        "task": "text-classification", "model": str(root / "model"), "dataset": "invented", "data": source,
        "settings": {"steps": 3, "batch_size": 4, "eval_every": 0, "save_every": 0, "log_every": 1},
        "probes": {"calibration": {}}, "shifted": {"other": {"source": "files", "path": str(root / "other")}},
        "seconds": 2, "memory": 0.01,
    }  # fmt: skip
    stages = {k: v for k, v in reviews.items() if k not in ("probes", "shifted")}
    stages |= {"stages": {"other": reviews["shifted"]["other"]}, "tuned_on": "reviews", "methods": ["lora"]}  # type: ignore[index]
    return Suite.model_validate(
        {
            "suite": "tiny", "version": 1, "tier": "smoke", "title": "Tiny",
            "protocol": {"trials": 2, "seeds": 2, "rates": [0.1, 100]},
            "methods": {"head_only": {}, "lora": {"fields": {"r": 2}}, "vpt": {}},
            "tasks": {"reviews": reviews | task, "sequence": stages},
        }
    )  # fmt: skip


def run(made: Suite, out: Path, *tasks: str) -> tuple[list[RunRecord], str]:
    said = io.StringIO()
    found = run_suite(made, out, choice=Choice(tasks), console=Console(file=said, width=200))
    return found, said.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    tiny.model(folder / "model", "bert_cls", text=True)
    for name in ("data", "other"):
        tiny.data(folder / name, "text-classification", SIZES)
    return folder


@pytest.fixture(scope="module")
def found(root: Path) -> list[RunRecord]:
    return run(suite(root), root / "out")[0]


@pytest.mark.slow
def test_every_run_is_recorded(found: list[RunRecord], root: Path) -> None:
    assert len(found) == 3 * (2 + 2) + 2
    assert {(r.method, r.status) for r in found} == {("head_only", "ok"), ("lora", "ok"), ("vpt", "inapplicable")}
    assert all("vpt" in r.error or "site" in r.error for r in found if r.method == "vpt")
    made = suite(root)
    assert {r.suite_hash for r in found} == {made.hash}
    own = folder_hash(root / "data")
    assert {r.own_data for r in found} == {own}, "tasks over the same rows say so"
    assert own not in {r.data for r in found}, "which also tells the shifted sets and the stages"
    assert json.loads((root / "out" / "suite.json").read_text())["suite"] == "tiny"
    assert {len(r.items) for r in found if r.phase == "trial" and r.status == "ok"} == {SIZES["valid"]}
    assert {len(r.items) for r in found if r.phase == "final" and r.task == "reviews" and r.status == "ok"} == {9}
    assert not list((root / "out" / "runs").glob("*")), "adapters of finished runs are not kept"


@pytest.mark.slow
def test_the_best_trial_gives_the_rate(found: list[RunRecord]) -> None:
    for method in ("head_only", "lora"):
        trials = [r for r in found if (r.method, r.phase) == (method, "trial")]
        best = max(trials, key=lambda r: (r.score or 0.0, -(r.learning_rate or 0.0)))
        finals = [r for r in found if (r.method, r.phase) == (method, "final")]
        assert {r.learning_rate for r in finals} == {best.learning_rate}
        assert len({r.learning_rate for r in trials}) == 2
    times = {r.method: sorted(t.learning_rate or 0 for t in found if t.phase == "trial" and t.method == r.method)
             for r in found if r.status == "ok"}  # fmt: skip
    ratio = [low / high for low, high in times.values()]
    assert ratio[0] == pytest.approx(ratio[1], rel=1e-2), "every method draws the same points of its range"


@pytest.mark.slow
def test_final_runs_are_probed(found: list[RunRecord]) -> None:
    final = next(r for r in found if (r.task, r.method, r.phase) == ("reviews", "lora", "final"))
    assert 0 <= float(str(final.probes["calibration"]["ece"])) <= 1
    assert final.probes["shift"]["other"]["score"] == final.score  # type: ignore[index, call-overload]
    assert final.gradient_bytes == 4 * (final.trainable_parameters or 0)
    assert (final.optimizer_bytes or 0) >= 2 * (final.gradient_bytes or 0)
    assert (final.allocator_peak_bytes or 0) > (final.saved_for_backward_bytes or 0) > 0
    assert final.throughput
    assert final.throughput_unit == "tokens/s"
    trial = next(r for r in found if r.phase == "trial" and r.status == "ok")
    assert not trial.probes


@pytest.mark.slow
def test_a_sequence_scores_every_test_set_after_every_stage(found: list[RunRecord]) -> None:
    for r in (r for r in found if r.task == "sequence"):
        probe = r.probes["sequence"]
        assert probe["tasks"] == ["sequence", "other"]
        matrix = probe["scores"]
        assert isinstance(matrix, list)
        assert [len(row) for row in matrix] == [2, 2, 2], "before training and after each stage"  # type: ignore[arg-type]
        assert r.score == pytest.approx(sum(matrix[-1]) / 2)  # type: ignore[arg-type]
        assert len(r.items) == 2 * SIZES["test"]


@pytest.mark.slow
def test_done_runs_are_not_repeated_and_a_lost_one_comes_back_the_same(found: list[RunRecord], root: Path) -> None:
    lost = next(r for r in found if (r.method, r.phase) == ("lora", "final"))
    path = root / "out" / "records" / file_name(lost.key)
    kept = {p: p.stat().st_mtime_ns for p in path.parent.glob("run-*.json") if p != path}
    path.unlink()
    left = root / "out" / "runs" / f"{lost.task}-lora-final-{lost.seed}"  # of one killed before its record
    left.mkdir(parents=True)
    (left / "metrics.json").write_text("{}")
    again, said = run(suite(root), root / "out")
    assert not left.exists()
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    back = next(r for r in again if r.key == lost.key)
    assert (back.score, back.items, back.curve) == (lost.score, lost.items, lost.curve)
    assert "runs are already done" in said


@pytest.mark.slow
def test_states_and_status(found: list[RunRecord], root: Path) -> None:
    made = suite(root)
    assert sum(s.missing for s in states(made, found)) == 0
    fewer = [r for r in found if r.phase == "trial"]
    missing = {(s.task, s.method): s.missing for s in states(made, fewer)}
    assert missing == {("reviews", m): 2 for m in made.methods} | {("sequence", "lora"): 2}
    status = command.status(made, root / "out")
    assert (status["done"], status["runs"], status["hours left"]) == (14, 14, 0.0)
    assert command.status(made, root / "nothing")["done"] == 0
    assert command.plan(made)["tasks"][0]["runs"] == 12


@pytest.mark.slow
def test_packed_records_come_back_whole(found: list[RunRecord], root: Path, tmp_path: Path) -> None:
    assert command.pack(root / "out", tmp_path / "study.jsonl.gz") == 14
    assert command.unpack(tmp_path / "study.jsonl.gz", tmp_path / "back") == 14
    assert command.unpack(tmp_path / "study.jsonl.gz", tmp_path / "back") == 0
    assert {r.key for r in read_results(tmp_path / "back")} == {r.key for r in found}
    assert read_results(tmp_path / "study.jsonl.gz") == read_results(root / "out")
    first = (tmp_path / "study.jsonl.gz").read_bytes()
    command.pack(tmp_path / "back", tmp_path / "study.jsonl.gz")
    assert (tmp_path / "study.jsonl.gz").read_bytes() == first
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not a pack"):
        read_results(tmp_path / "bad.gz")


def test_changed_data_are_refused_before_any_run(root: Path, tmp_path: Path) -> None:
    source = {"source": "files", "path": str(root / "data"), "sha256": folder_hash(root / "data")}
    made = suite(root, data=source)
    source["sha256"] = source["sha256"][::-1]
    with pytest.raises(DataError, match="SHA-256"):
        run(suite(root, data=source), tmp_path / "out")
    assert not list((tmp_path / "out" / "records").iterdir())
    assert made.hash != suite(root, data=source).hash


@pytest.mark.slow
def test_what_cannot_be_fetched_is_said_and_does_not_hold_up_the_rest(
    found: list[RunRecord], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = suite(root)
    tasks = {"gone": made.tasks["reviews"], "after": made.tasks["sequence"].model_copy(update={"tuned_on": "gone"})}

    def gather(task: SuiteTask) -> Material:
        if task.dataset == "gone":
            raise AssetError("The archive is no longer there.", "Put it into downloads/.")
        return sources.gather(task)

    tasks["gone"] = tasks["gone"].model_copy(update={"dataset": "gone"})
    more = made.model_copy(update={"tasks": tasks | made.tasks})
    monkeypatch.setattr("peftree.bench.run.gather", gather)
    shutil.copytree(root / "out" / "records", tmp_path / "records")
    (tmp_path / "records" / file_name(found[-1].key)).unlink()
    said = io.StringIO()
    with pytest.raises(AssetError, match="no longer there"):
        run_suite(more, tmp_path, console=Console(file=said, width=200))
    assert {r.key for r in read_records(tmp_path / "records")} == {r.key for r in found}, "all others were done"
    assert [line.split()[0] for line in said.getvalue().splitlines() if "is left out" in line] == ["gone", "after"]
    for choice in (Choice(("gone",)), Choice(("gone", "after"))):
        with pytest.raises(AssetError):
            run_suite(more, tmp_path / "none", choice=choice)
    assert not (tmp_path / "none" / "runs").exists()


@pytest.mark.parametrize(
    ("choice", "words"),
    [(Choice(("revews",)), "Did you mean 'reviews'"), (Choice((), ("lroa",)), "Did you mean 'lora'")],
)
def test_an_unknown_choice_is_refused(root: Path, tmp_path: Path, choice: Choice, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_suite(suite(root), tmp_path / "out", choice=choice)


def test_a_task_tuned_on_one_that_was_not_run(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--task reviews"):
        run(suite(root), tmp_path / "out", "sequence")


@pytest.mark.slow
def test_a_diverged_run_is_a_result(found: list[RunRecord], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(config: object) -> None:
        raise DivergedError("The loss of step 2 is not finite.", "Lower lr.")

    monkeypatch.setattr(cell, "complete", diverge)
    one = next(r for r in found if r.method == "lora")
    facts = {k: getattr(one, k) for k in ("suite", "task", "dataset", "data", "model", "modality", "kind", "method")}
    facts |= {k: getattr(one, k) for k in ("branch", "fields", "budget", "learning_rate", "metric", "phase")}
    config = {"model": "x", "data": "x", "output": str(root / "diverged")}
    path = cell.work({"facts": facts | {"seed": 99}, "config": config, "records": str(root / "lost")})
    record = RunRecord.model_validate_json(path.read_text())
    assert record.status == "diverged"
    assert record.settled
    assert "not finite" in record.error
