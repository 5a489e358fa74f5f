"""One new file is a whole probe: named by a suite, measured by a run, checked, read and tabled, with no other edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from demo import tiny
from peftree import probes, report
from peftree.bench.run import run_suite
from peftree.bench.suite import Suite, load_suite
from peftree.cli import app
from peftree.errors import ConfigError, DataError
from peftree.evaluate.subject import UNMEASURED
from peftree.runs.record import RunRecord

SOURCE = '''"""Scaling: the score with every trained tensor scaled (an example)."""
from pydantic import Field, FiniteFloat
from peftree.evaluate.subject import CLASSES, Result, Unmeasured, some
from peftree.probes import Probe, Sheet
from peftree.table import Head, number

class Found(Result):
    whole: FiniteFloat
    scaled: FiniteFloat

class Scaling(Probe):
    name = "scaling"
    tasks = CLASSES
    result = Found
    sheet = Sheet("Scaled adapters", "{metric}; means over the seeds.", (Head("Whole"), Head("Scaled")),
                  lambda found, scale: [number(x, scale.decimals) for x in (found.whole, found.scaled)])
    by: float = Field(0.5, gt=0, description="factor on the trained tensors")
    limit: int = Field(0, ge=0, description="rows, evenly spread; 0: all")

    def measure(self, subject):
        import torch
        rows, tensors = [row for _, row in some(subject.rows, self.limit)], list(subject.adapter.parameters())
        whole, kept = subject.score(rows).score, [t.detach().clone() for t in tensors]
        with torch.no_grad():
            torch._foreach_mul_(tensors, self.by)
            scaled = subject.score(rows).score
            torch._foreach_copy_(tensors, kept)
        return Found(whole=whole, scaled=scaled)
'''

SUITE = """\
suite: mine
version: 1
tier: smoke
title: Mine
protocol: {{trials: 0, seeds: 2}}
methods: {{lora: {{fields: {{r: 2}}}}}}
tasks:
  reviews:
    task: text-classification
    model: {root}/model
    dataset: invented
    data: {{source: files, path: {root}/data}}
    settings: {{steps: 3, batch_size: 4, eval_every: 0, save_every: 0}}
    probes: {{scaling: {{{settings}}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Put the probe's file into a folder that is looked into; a tiny model and its rows lie beside."""
    root = tmp_path_factory.mktemp("mine")
    tiny.model(root / "model", "bert_cls", text=True)
    tiny.data(root / "data", "text-classification", {"train": 24, "valid": 6, "test": 9})
    (root / "probes").mkdir()
    (root / "probes" / "scaling.py").write_text(SOURCE)
    probes.register_folder(root / "probes")
    yield root
    probes.forget_folder(root / "probes")


def suite(folder: Path, settings: str) -> Suite:
    """Return the suite that names the probe with these settings."""
    (folder / "mine.yaml").write_text(SUITE.format(root=folder, settings=settings))
    return load_suite(folder / "mine.yaml")


@pytest.fixture(scope="module")
def records(folder: Path) -> list[RunRecord]:
    """Return the records of the suite, whose runs are processes of their own."""
    return run_suite(suite(folder, "by: 0.25, limit: 4"), folder / "out")


def test_a_suite_names_it_and_its_settings_are_checked(folder: Path) -> None:
    assert suite(folder, "by: 2").tasks["reviews"].probes == {"scaling": {"by": 2}}
    for settings, said in (
        ("by: 0", r"scaling: by=0.*factor on the trained"),
        ("bye: 1", "scaling: there is no key 'bye'"),
    ):
        with pytest.raises(ConfigError, match=said):
            suite(folder, settings)
    probes.forget_folder(folder / "probes")
    with pytest.raises(ConfigError, match="There is no probe 'scaling'"):
        suite(folder, "by: 2")
    probes.register_folder(folder / "probes")


def test_a_run_has_its_result_in_the_record(records: list[RunRecord]) -> None:
    assert [r.status for r in records] == ["ok", "ok"]
    for record in records:
        found = record.probes["scaling"]
        assert list(found) == ["whole", "scaled"] and all(0 <= float(str(score)) <= 1 for score in found.values())


def test_the_report_has_its_table(records: list[RunRecord], folder: Path) -> None:
    shown = CliRunner().invoke(app, ["report", str(folder / "out"), "--markdown"], catch_exceptions=False).stdout
    assert "Scaled adapters" in shown and "| Method | Whole | Scaled |" in shown
    data = json.loads(CliRunner().invoke(app, ["report", str(folder / "out"), "--json"], catch_exceptions=False).stdout)
    mean = sum(float(str(r.probes["scaling"]["whole"])) for r in records) / len(records)
    assert data["tasks"][0]["rows"][0]["probes"]["scaling"]["whole"] == pytest.approx(mean)
    why = {"scaling": {UNMEASURED: "There are no test rows."}}
    (row,) = report.build([r.model_copy(update={"probes": why}) for r in records]).tasks[0].rows
    assert row.probes["scaling"].model_dump(by_alias=True) == why["scaling"]
    bad = [r.model_copy(update={"probes": {"scaling": {"whole": 1.0}}}) for r in records]
    with pytest.raises(DataError, match="probe 'scaling': scaled is missing"):
        report.build(bad)


def test_two_files_of_one_name_are_refused(folder: Path) -> None:
    again = folder / "probes" / "again.py"
    again.write_text(SOURCE)
    probes.probes.cache_clear()
    with pytest.raises(ConfigError, match=r"scaling\.py: there is already a probe 'scaling'"):
        probes.probes()
    again.unlink()
    probes.probes.cache_clear()


@pytest.mark.parametrize(
    ("source", "said"),
    [("import nowhere", "does not load: ModuleNotFoundError"), ("def (", "does not load: SyntaxError"),
     (SOURCE.replace("    result = Found\n", "").replace("scaling", "other"), "'other' lacks its result or its sheet"),
     (SOURCE.replace("  sheet = Sheet", "  _was = Sheet").replace("scaling", "other"), "lacks its result or")],
)  # fmt: skip
def test_a_faulty_file_is_named(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "faulty.py").write_text(source)
    probes.register_folder(tmp_path)
    probes.register_folder(tmp_path)  # twice is once
    try:
        with pytest.raises(ConfigError, match=f"faulty.py.*{said}"):
            probes.check({"calibration": {}})
    finally:
        probes.forget_folder(tmp_path)
    assert probes.check({"calibration": {}}) and str(tmp_path) not in probes.folders()
    with pytest.raises(ConfigError, match="is not a folder"):
        probes.register_folder(tmp_path / "nowhere")
