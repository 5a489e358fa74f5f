"""The demo from end to end on tiny random models: records, table, page, resuming, clear refusals."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo import tiny
from peftree import machine as bench_machine
from peftree.bench.record import read_record, read_records
from peftree.demo import run
from peftree.demo.plan import Plan
from peftree.errors import ConfigError

FAMILIES = {
    "text-classification": ("bert_cls", True),
    "generation": ("llama", True),
    "image-classification": ("vit", False),
}
SETTINGS = {"steps": 3, "batch_size": 4, "eval_every": 0, "save_every": 0, "log_every": 1}
METHODS = ("full", "head_only", "lora")


def tiny_plan(**changes: Any) -> Plan:
    task = {
        "dataset": "invented", "sizes": {"train": 24, "valid": 6, "test": 9}, "settings": SETTINGS,
        "memory": 0.01, "methods": {name: {"seconds": 2} for name in METHODS},
    }  # fmt: skip
    tasks = {name: task | {"model": family} for name, (family, _) in FAMILIES.items()}
    facts = {"suite": "tiny", "minutes": 1, "machine": "a test", "seeds": 1, "tasks": tasks}
    return Plan.model_validate(facts | changes)


def prepare(patch: pytest.MonkeyPatch, folder: Path, made: Plan) -> None:
    """Let the demo do the plan `made`, on tiny models and invented data."""

    def model_folder(name: str) -> Path:
        text = next(text for family, text in FAMILIES.values() if family == name)
        target = folder / "models" / name
        return target if target.exists() else tiny.model(target, name, text=text)

    patch.setenv("PEFTREE_CACHE", str(folder))
    patch.setattr(run, "model_folder", model_folder)
    patch.setattr(run, "write_demo_data", tiny.data)
    patch.setattr(run, "read_plan", lambda quick: made)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Plan], None]:
    return lambda made: prepare(monkeypatch, tmp_path, made)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole demo: three tasks, three methods, two seeds."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, folder, tiny_plan())
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            run.main(folder / "out", seeds=2, quick=False)
    (folder / "said.txt").write_text(" ".join(said.getvalue().split()))
    return folder


def test_every_run_has_a_record(demo: Path) -> None:
    found = read_records(demo / "out" / "records")
    assert len(found) == 18 and {r.status for r in found} == {"ok"}
    assert {(r.task, r.method) for r in found} == {(t, m) for t in FAMILIES for m in METHODS}
    assert {r.method for r in found if r.base_score is not None} == {METHODS[0]}
    for record in found:
        assert record.environment["threads"] == 1 and record.environment["torch"]
        assert record.environment["system"] == os.uname().sysname
        assert record.steps == 3 and record.n_train == 24 and len(record.items) == 9
        assert record.peak_rss_bytes and record.step_seconds and record.curve
        assert record.trainable_parameters and record.adapter_bytes and record.saved_for_backward_bytes


def test_it_says_what_it_does_and_what_comes_next(demo: Path) -> None:
    said = (demo / "said.txt").read_text()
    assert "18 runs: 3 methods, 3 tasks" in said and "It took 1 minutes on a test." in said
    assert "18/18" in said and "no difference shown" in said
    assert str(demo / "out" / "report.html") in said.replace(" ", "")
    best = re.search(r"peftree eval (\S+)", said)
    assert best is not None and (Path(best[1]) / "adapter").is_dir()


def test_page_and_table_hold_everything(demo: Path) -> None:
    for name in ("report.html", "table.txt"):
        text = " ".join((demo / "out" / name).read_text("utf-8").split())
        assert all(word in text for word in (*FAMILIES, *METHODS, "no difference shown"))
        assert "keeps the frozen base beside the trained copy" in text


def test_a_second_call_does_only_what_is_missing(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted((demo / "out" / "records").glob("run-*.json"))
    kept = {path: path.read_bytes() for path in paths[1:]}
    score = read_record(paths[0]).score
    paths[0].unlink()
    prepare(monkeypatch, demo, tiny_plan())
    run.main(demo / "out", seeds=2, quick=False)
    assert "17 of 18 runs are done already" in capsys.readouterr().out
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert read_record(paths[0]).score == score


def test_a_run_that_fails_is_a_row(
    plan: Callable[[Plan], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny_plan()
    task = made.tasks["text-classification"]
    lost = task.methods["lora"].model_copy(update={"fields": {"sites": "xattn.q"}})
    methods = {**task.methods, "lora": lost}
    changed = task.model_copy(update={"methods": methods})
    plan(made.model_copy(update={"tasks": {"text-classification": changed}}))
    run.main(tmp_path / "out", seeds=1, quick=False)
    said = capsys.readouterr().out
    failed = [r for r in read_records(tmp_path / "out" / "records") if r.status == "failed"]
    assert [r.method for r in failed] == ["lora"]
    assert failed[0].error.startswith("SiteError: ") and "Traceback" not in failed[0].error
    assert "failed: SiteError" in said
    table = (tmp_path / "out" / "table.txt").read_text("utf-8")
    assert "2 finished, 1 failed" in table and "text-classification, lora, seed 0" in table


def test_quick_runs_one_seed(plan: Callable[[Plan], None], tmp_path: Path) -> None:
    made = tiny_plan()
    plan(made.model_copy(update={"tasks": {"generation": made.tasks["generation"]}}))
    run.main(tmp_path / "out", seeds=2, quick=True)
    assert {r.seed for r in read_records(tmp_path / "out" / "records")} == {0}


def test_ctrl_c_keeps_what_is_done(
    plan: Callable[[Plan], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    plan(tiny_plan())
    monkeypatch.setattr(run, "run_cells", interrupted)
    with pytest.raises(SystemExit) as stop:
        run.main(tmp_path / "out", seeds=2, quick=False)
    assert stop.value.code == 130
    assert "0 of 18 runs are kept; the same command goes on" in capsys.readouterr().out


def test_too_little_memory_or_disk_is_said_before_anything_is_fetched(
    plan: Callable[[Plan], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_plan()
    task = made.tasks["generation"].model_copy(update={"memory": 1e6})
    plan(made.model_copy(update={"tasks": {"generation": task}}))
    with pytest.raises(ConfigError, match="takes 1000000"):
        run.main(tmp_path / "out", seeds=1, quick=False)
    monkeypatch.setattr(run, "free_memory", lambda: 1e18)
    monkeypatch.setattr(run, "OUT_GIB", 1e9)
    with pytest.raises(ConfigError, match="GiB of disk"):
        run.main(tmp_path / "out", seeds=1, quick=False)
    assert not (tmp_path / "out" / "data").exists()


def test_free_memory_is_plausible() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < bench_machine.free_memory() <= total


def test_memory_limits_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "limits"
    path.write_text("MemTotal:  9 kB\nMemAvailable:    17 kB\n")
    assert bench_machine._number(path, "MemAvailable:") == 17
    path.write_text("max\n")
    assert bench_machine._number(path) == 0
    assert bench_machine._number(tmp_path / "none") == 0


@pytest.mark.slow
@pytest.mark.enable_socket
def test_the_real_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the real models and data, fetched if they are not cached."""
    run.main(tmp_path, seeds=1, quick=True)
    found = read_records(tmp_path / "records")
    assert {r.status for r in found} == {"ok"}, [r.error for r in found]
    base = {r.task: r.base_score for r in found if r.base_score is not None}
    scores = {(r.task, r.method): r.score for r in found if r.score is not None}
    for (task, method), score in scores.items():
        if method == "full":
            better = score < base[task] if task == "generation" else score > base[task]
            assert better, f"{task}: {score} after, {base[task]} before"
    assert re.search(r"report\.html", capsys.readouterr().out)
