"""The demo from end to end on tiny random models: records, table, page, resuming, clear refusals."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from demo import tiny
from invented import fabricated
from peftree import demo as demos
from peftree import machine as bench_machine
from peftree import registry
from peftree.assets.models import MODELS
from peftree.bench import run as suites
from peftree.bench.suite import Suite, SuiteTask, load_suite
from peftree.errors import AssetError, ConfigError
from peftree.runs.read import read_record, read_records

TASKS = {
    "words": ("text-classification", "bert_cls", True),
    "answers": ("generation", "llama", True),
    "pictures": ("image-classification", "vit", False),
}
SIZES = {"train": 24, "valid": 6, "test": 9}
SETTINGS = {"steps": 3, "batch_size": 4, "eval_every": 0, "save_every": 0, "log_every": 1}
METHODS = ("full", "head_only", "lora")
BRANCHES = {"additive", "selective", "reparameterized", "hybrid", "moe", "unified"}


def tiny_suite(folder: Path, tasks: tuple[str, ...] = tuple(TASKS), **methods: Any) -> Suite:
    """Return a suite on tiny models and invented data, which are made in `folder`."""
    made = {}
    for name in tasks:
        kind, family, text = TASKS[name]
        model, data = folder / "models" / family, folder / "data" / name
        if not model.exists():
            tiny.model(model, family, text=text)
            tiny.data(data, kind, SIZES)
        made[name] = {
            "task": kind, "model": str(model), "dataset": "invented", "data": {"path": str(data)},
            "settings": SETTINGS, "memory": 0.01, "seconds": 2,
        }  # fmt: skip
    facts = {"suite": "tiny", "version": 1, "tier": "smoke", "title": "Tiny", "protocol": {"trials": 0, "seeds": 1}}
    entries = {name: {} for name in METHODS} | methods
    return Suite.model_validate(facts | {"methods": entries, "tasks": made})


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole demo: three tasks, three methods, two seeds."""
    folder = tmp_path_factory.mktemp("demo")
    suite, said = tiny_suite(folder), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(demos, "load_suite", lambda name: suite)
        demos.main(folder / "out", 2)
    (folder / "said.txt").write_text(" ".join(said.getvalue().split()))
    return folder


@pytest.mark.slow
def test_every_run_has_a_record(demo: Path) -> None:
    found = read_records(demo / "out" / "records")
    assert len(found) == 18 and {r.status for r in found} == {"ok"}
    assert {(r.task, r.method) for r in found} == {(t, m) for t in TASKS for m in METHODS}
    for record in found:
        assert record.environment["threads"] == 1 and record.environment["torch"]
        assert record.environment["system"] == os.uname().sysname
        assert record.steps == 3 and record.n_train == 24 and len(record.items) == 9
        assert record.peak_rss_bytes and record.step_seconds and record.curve
        assert record.trainable_parameters and record.adapter_bytes and record.saved_for_backward_bytes


@pytest.mark.slow
def test_it_says_what_it_does_and_what_comes_next(demo: Path) -> None:
    said = (demo / "said.txt").read_text()
    assert "18 runs: 3 methods, 3 tasks, seeds: 2" in said and "about 1 min." in said
    assert said.count("6/6") >= 3 and "no difference shown" in said
    assert str(demo / "out" / "report.html") in said.replace(" ", "")
    best = re.search(r"peftree eval (\S+)", said)
    assert best is not None and (Path(best[1]) / "adapter").is_dir()


@pytest.mark.slow
def test_page_and_table_hold_everything(demo: Path) -> None:
    for name in ("report.html", "table.txt"):
        text = " ".join((demo / "out" / name).read_text("utf-8").split())
        assert all(word in text for word in (*TASKS, *METHODS, "no difference shown"))
        assert all(note in text for note in demos.NOTES)


@pytest.mark.slow
def test_a_second_call_does_only_what_is_missing(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted((demo / "out" / "records").glob("run-*.json"))
    kept = {path: path.read_bytes() for path in paths[1:]}
    score = read_record(paths[0]).score
    paths[0].unlink()
    suite = tiny_suite(demo)
    monkeypatch.setattr(demos, "load_suite", lambda name: suite)
    demos.main(demo / "out", 2)
    assert "5 of 6 runs are already done" in capsys.readouterr().out
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert read_record(paths[0]).score == score


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tiny_suite(tmp_path, ("words",), lora={"fields": {"sites": "xattn.q"}})
    monkeypatch.setattr(demos, "load_suite", lambda name: suite)
    demos.main(tmp_path / "out", 1)
    lost = [r for r in read_records(tmp_path / "out" / "records") if r.status != "ok"]
    assert [(r.method, r.status) for r in lost] == [("lora", "inapplicable")] and "Traceback" not in lost[0].error
    assert "lora, seed 0: inapplicable: " in capsys.readouterr().out
    table = (tmp_path / "out" / "table.txt").read_text("utf-8")
    assert "2 finished, 0 failed, 1 not applicable" in table and "words, lora, seed 0" in table


def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demos, "run_suite", interrupted)
    monkeypatch.setattr(demos, "check_machine", lambda suite, out: None)
    with pytest.raises(SystemExit) as stop:
        demos.main(tmp_path / "out", 2)
    assert stop.value.code == 130 and "the same command continues" in capsys.readouterr().out


def test_too_little_memory_or_disk_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demos, "free_memory", lambda: 2.0**30)
    with pytest.raises(ConfigError, match=r"takes 4\.8 GiB of memory; 1\.0 GiB are free"):
        demos.main(tmp_path / "out", 1)
    monkeypatch.setattr(demos, "free_memory", lambda: 1e18)
    monkeypatch.setattr(demos, "OUT_GIB", 1e9)
    with pytest.raises(ConfigError, match="GiB of disk"):
        demos.main(tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_fetched_is_said_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(task: SuiteTask) -> Any:
        if task.model.startswith("smollm2"):
            raise AssetError("It is gone.", "Try again.")
        return real(task)

    real = suites.gather
    monkeypatch.setattr(suites, "gather", gather)
    monkeypatch.setattr(demos, "check_machine", lambda suite, out: None)
    monkeypatch.setattr(suites, "run_cells", lambda *a, **more: pytest.fail("a run was started"))
    suite = tiny_suite(tmp_path, ("words", "answers"))
    tasks = suite.tasks | {"answers": suite.tasks["answers"].model_copy(update={"model": "smollm2-135m"})}
    monkeypatch.setattr(demos, "load_suite", lambda name: suite.model_copy(update={"tasks": tasks}))
    with pytest.raises(AssetError, match="It is gone"):
        demos.main(tmp_path / "out", 1)


def test_the_suite_has_every_branch_full_fine_tuning_and_room_for_three_seeds() -> None:
    suite = load_suite("demo")
    entries = [(name, entry) for name in suite.tasks for _, entry in suite.entries(name)]
    assert {registry.get(e.method).tags.branch for _, e in entries} - {"reference"} == BRANCHES
    assert all(task.model in MODELS for task in suite.tasks.values())
    assert all("full" in [e.method for n, e in entries if n == name] for name in suite.tasks)
    seconds = sum(suite.tasks[name].seconds * e.cost for name, e in entries) * suite.protocol.seeds
    assert suite.protocol.seeds == 3 and seconds / 2 < 9 * 60


def test_paths_and_commands_are_printed_in_one_piece(tmp_path: Path) -> None:
    out, said = tmp_path / "a folder with a name longer than a line of this terminal" / "results", io.StringIO()
    out.mkdir(parents=True)
    demos.show(load_suite("demo"), fabricated(), out, Console(file=said, width=60))
    assert f"The report: {out / 'report.html'} (open it" in said.getvalue()
    assert "  peftree train model=minilm-l6 data=YOUR.csv method=lora    # columns: text, label\n" in said.getvalue()


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
def test_the_real_demo_with_one_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the real models and data, fetched if they are not cached; two methods of each task, fewer steps and rows."""
    suite = load_suite("demo")
    fewer = {
        name: task.model_copy(update={
            "methods": (f"{name}-full", f"{name}-lora"), "settings": task.settings | {"steps": steps},
            "data": task.data.model_copy(update={"sizes": {**task.data.sizes, "valid": rows, "test": rows}}),
        })
        for (name, task), steps, rows in zip(suite.tasks.items(), (20, 4, 40), (200, 20, 200), strict=True)
    }  # fmt: skip
    monkeypatch.setattr(demos, "load_suite", lambda name: suite.model_copy(update={"tasks": fewer}))
    demos.main(tmp_path, 1)
    found = read_records(tmp_path / "records")
    assert {r.status for r in found} == {"ok"}, [r.error for r in found]
    assert {(r.task, r.method) for r in found} == {(task, name) for task in fewer for name in ("full", "lora")}
    base = {r.task: r.base_score for r in found if r.base_score is not None}
    for r in (r for r in found if r.method == "full" and r.score is not None):
        better = r.score < base[r.task] if r.task == "definitions" else r.score > base[r.task]
        assert better, f"{r.task}: {r.score} after, {base[r.task]} before"
    said = capsys.readouterr().out
    for task in fewer:
        assert f"\n{task}: of full fine-tuning's gain over the score before training are kept: lora " in said, said
    assert f"The report: {tmp_path / 'report.html'} (" in said  # in one piece, however long the path


def test_the_rates_are_those_that_were_found_on_validation_rows() -> None:
    suite, page = load_suite("demo"), (Path(__file__).parents[2] / "docs" / "demo-rates.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    best = {(row[0], row[1]): float(row[-1]) for row in rows[1:] if not row[0].startswith("-")}
    assert best == {(task, e.method): e.times for task in suite.tasks for _, e in suite.entries(task)}
