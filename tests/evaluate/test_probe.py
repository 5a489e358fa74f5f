"""Every probe on tiny runs: plain JSON, the model as it was, and clear words where it cannot be done."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import house
import peftree
from evaluate import tiny
from peftree.errors import AdapterError, ConfigError
from peftree.probes import check, probes, run_probes
from peftree.probes.calibration import Calibration, Found

QUICK: dict[str, dict[str, Any]] = {
    "calibration": {},
    "noise": {"limit": 3},
    "corruptions": {"limit": 2},
    "shuffled": {"limit": 5},
    "retention": {"neighbours": 2},
    "interpretability": {"matrices": 3, "rows": 6, "layers": 2, "limit": 4},
    "latency": {"rounds": 3, "seconds": 0},
}
RUNS = [
    ("bert_cls", "lora"), ("bert_cls", "full"), ("bert_cls", "unipelt"), ("llama", "lora"), ("llama", "lst"),
    ("llama", "molora"), ("vit", "vpt"), ("vit", "ssf"), ("vit", "head_only"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "method"), RUNS)
def test_a_probe_leaves_the_run_as_it_was(base: str, method: str, tmp_path: Path) -> None:
    general = [tiny.Line(r.source, f"group {i % 2}") for i, r in enumerate(tiny.lines(tiny.TASKS[base], tmp_path, 6))]
    subject = tiny.subject(base, method, tmp_path, moved=0.05, general=general)
    subject.model.train()
    before, modes = tiny.snapshot(subject.model), [m.training for m in subject.model.modules()]
    random, first = torch.get_rng_state(), subject.score(subject.rows)
    found = run_probes(subject, QUICK)
    after = tiny.snapshot(subject.model)
    assert after.keys() == before.keys()
    assert all(after[k][0] == before[k][0] and torch.equal(after[k][1], before[k][1]) for k in before)
    assert [m.training for m in subject.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert peftree.active(subject.model) == ("default",) and subject.score(subject.rows) == first
    assert list(found) == list(QUICK)
    json.dumps(found, allow_nan=False)
    task = subject.task
    done = {name for name, result in found.items() if "not measured" not in result}
    assert done == {n for n in QUICK if not probes()[n].tasks or task in probes()[n].tasks}


def test_every_setting_has_a_description() -> None:
    assert probes().keys() == QUICK.keys()
    assert all(f.description for probe in probes().values() for f in probe.model_fields.values())


def test_probes_are_read_and_their_settings_checked_without_torch() -> None:
    words = "import peftree.bench.suite, peftree.probes; peftree.probes.check({'noise': {}})"
    loaded = house.loaded_by(words, Path(sys.modules["peftree"].__file__ or "").parents[1])
    assert "pydantic" in loaded and "torch" not in loaded


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"calibraton": {}}, "Did you mean 'calibration'"),
        ({"noise": {"limits": 3}}, "Did you mean 'limit'"),
        ({"noise": {"limit": -1}}, "limit=-1.*rows, evenly spread"),
        ({"latency": {"rounds": "many"}}, "rounds='many'"),
    ],
)
def test_wrong_settings_are_refused(wanted: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(wanted)


def test_what_does_not_apply_says_so(tmp_path: Path) -> None:
    subject = tiny.subject("llama", "lora", tmp_path)
    found = run_probes(subject, {"calibration": {}, "corruptions": {}, "retention": {}})
    assert found["calibration"] == {
        "not measured": "The probe is for text-classification, image-classification, not generation."
    }
    assert "captioning" in str(found["corruptions"]["not measured"])
    assert found["retention"] == {"not measured": "0 general rows were given, but at least two are needed."}


def test_no_rows_is_no_gap(tmp_path: Path) -> None:
    subject = replace(
        tiny.subject("vit", "lora", tmp_path), rows=[], general=tiny.lines("image-classification", tmp_path)
    )
    found = run_probes(subject, {name: {} for name in probes() if name != "noise"})
    inside = found.pop("interpretability")
    assert all("not measured" in result for result in found.values())
    assert "relative_update" in inside  # the weights need no rows
    assert all("no test rows" in str(inside[part]) for part in ("cka", "knockout"))


def test_an_adapter_that_is_off_or_merged_is_refused(tmp_path: Path) -> None:
    subject = tiny.subject("bert_cls", "lora", tmp_path)
    peftree.switch(subject.model, None)
    with pytest.raises(AdapterError, match="Only 'default' may be on"):
        run_probes(subject, {"calibration": {}})
    peftree.switch(subject.model, "default")
    peftree.merge(subject.model)
    with pytest.raises(AdapterError, match="Only 'default' may be on"):
        run_probes(subject, {"calibration": {}})


def test_a_figure_that_is_not_finite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = dict.fromkeys(("brier", "nll", "accuracy", "confidence", "items"), 0.0)
    monkeypatch.setattr(Calibration, "measure", lambda *_: Found.model_validate({"ece": float("nan"), **figures}))
    with pytest.raises(ValueError, match="finite number"):
        run_probes(tiny.subject("bert_cls", "lora", tmp_path), {"calibration": {}})
