"""The lab: what each method's runs say, and that its page is made from its records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tools import lab

from peftree import registry


def record(method: str, factor: int, seed: int, **more: Any) -> dict[str, Any]:
    return {"method": method, "factor": factor, "seed": seed, "state": "s", "status": "ok", "lr": 1.0} | more


def test_the_page_is_made_from_the_records() -> None:
    before = (lab.LAB / "index.md").read_text("utf-8")
    lab.page()
    assert (lab.LAB / "index.md").read_text("utf-8") == before, "run `make lab-page`"


def test_every_method_is_tried_at_three_rates_with_three_seeds_and_the_default_first() -> None:
    every = lab.cells()
    assert len(every) == len(set(every)) == 9 * len(registry.methods())
    assert [c.method for c in every[:10]] == ["head_only"] * 9 + ["full"]
    assert [(c.factor, c.seed) for c in every if c.method == "lora"][:4] == [(1, 0), (1, 1), (1, 2), (3, 0)]


def runs(method: str, *losses: float) -> list[dict[str, Any]]:
    """Return the records of a method at each rate with each seed, in the order of `losses`; inf: it diverged."""
    order = [(factor, seed) for factor in lab.FACTORS for seed in lab.SEEDS]
    every = zip(order, losses, strict=False)
    more = [{"loss": x} if x < math.inf else {"status": "diverged", "error": "It diverged."} for x in losses]
    return [record(method, factor, seed, **m) for ((factor, seed), _), m in zip(every, more, strict=True)]


def test_a_method_learns_at_the_first_rate_at_which_every_seed_is_below_frozen_and_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = runs("head_only", *[0.9] * 6, 0.7, 0.75, 0.65)
    head[0]["frozen"] = 1.0
    rows = [
        record("lora", 1, 0, loss=0.1) | {"state": "of other settings"}, *head,
        *runs("lora", 0.5, 0.95, 0.5, 0.6, 0.6, 0.6), *runs("dora", 0.8, 0.6, 0.6), *runs("ia3", *[2.0] * 8, math.inf),
        *runs("full", 0.6, 0.6), record("dora", 1, 0, loss=0.69),
        record("vpt", 1, 0, status="inapplicable", error="No image here."),
    ]  # fmt: skip
    monkeypatch.setattr(lab, "LAB", tmp_path)

    def section(rows: list[dict[str, Any]]) -> str:
        (tmp_path / "movies.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return "\n".join(lab.section("movies", {"all": {"ia3": "It is scaled."}}))

    text = section(rows)
    assert "the frozen model 1.0000, the head alone 0.7000" in text
    assert "| lora | 0.0005 | 0.6500 (0.500-0.950) | 0.6000 (0.600-0.600) |  | 3 x |" in text
    rate = registry.get("dora").tags.lr
    assert f"| dora | {rate:g} | 0.6300 (0.600-0.690) |  |  | default |" in text  # the last record of a run counts
    assert "2.0000 (2.000-2.000) | inf (2.000-inf) | none |" in text and "| 0.6000 (0.600-0.600) |  |  | open |" in text
    counts = "1 learn at their default rate, 1 more at three times that, 0 more at ten times, 1 at none of them; of 1"
    assert f"Of 4 methods {counts} runs are missing" in text
    assert "* ia3: It is scaled." in text and "* full" not in text and "* vpt: No image here." in text
    assert "Of 4 methods 0 learn" in section([r for r in rows if r is not head[-1]]), (
        "the head's runs are not all there"
    )


def test_what_can_change_no_verdict_is_not_needed() -> None:
    head = runs("head_only", *[0.9] * 9)
    head[0]["frozen"] = 1.0
    known = [*head, *runs("lora", 0.95, 0.5), *runs("dora", 0.5, 0.5), *runs("ia3", 0.5, 0.5, 0.5), *runs("vpt", 0.95)]
    asked = {name: lab.needed(lab.Cell(name, 1, 2), known) for name in ("lora", "dora", "ia3", "bitfit")}
    assert asked == {"lora": False, "dora": True, "ia3": False, "bitfit": True}
    assert lab.needed(lab.Cell("vpt", 3, 0), known) and not lab.needed(lab.Cell("ia3", 3, 0), known)
    assert lab.needed(lab.Cell("ia3", 3, 0), known[1:]), "without the frozen model's loss nothing is settled"


@pytest.mark.slow
@pytest.mark.enable_socket  # fetches what the cache lacks
def test_a_run_continues_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = lab.TASKS["movies"]
    sizes = {"train": 32, "valid": 8, "test": 16}
    small = {"settings": {**task.settings, "steps": 4}, "data": task.data.model_copy(update={"sizes": sizes})}
    monkeypatch.setattr(lab, "LAB", tmp_path)
    monkeypatch.setattr(lab, "TASKS", {"movies": task.model_copy(update=small)})
    monkeypatch.setattr(lab, "SEEDS", (0,))
    monkeypatch.setattr(lab, "FACTORS", (1, 10))
    lab.run("movies", {"head_only", "vpt", "lora"}, again=False)
    found = lab.records("movies")
    assert [(r["method"], r["factor"], r["status"]) for r in found] == [
        ("head_only", 1, "ok"), ("head_only", 10, "ok"), ("lora", 1, "ok"), ("lora", 10, "ok"),
        ("vpt", 1, "inapplicable"),
    ]  # fmt: skip
    assert found[0]["frozen"] != found[0]["loss"] and 0.3 < found[2]["loss"] < 1.5
    lab.run("movies", {"head_only", "vpt", "lora"}, again=False)
    assert lab.records("movies") == found and len((tmp_path / "movies.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([0.6, 0.8, 0.9, 0.69, 0.5, 0.9], "at 3 x, 2 of 3 seeds are below (0.500 to 0.900); it depends on"),
        ([0.6, 0.8], "at the default rate, 1 of 2 seeds are below (0.600 to 0.800); it"),
        ([0.999, 1.001, 1.004], "it hardly moves in so few steps: no loss is further than 0.0040 from the frozen"),
        ([0.8, 1.3, 0.9], "its loss is above at every rate (0.800 to 1.300)."),
        ([0.8, math.inf], "its loss is above at every rate (0.800 to inf)."),
        ([0.95, 0.9, 0.95, 0.9, 0.8], "its loss falls with the rate, from 0.933 to 0.850: the default is low"),
        ([0.8, 0.8, 0.9, 1.3], "its loss rises with the rate, from 0.833 to 1.300: the default is high"),
        ([1.8, 1.8, 1.9, 1.3], "its loss is above at every rate (1.300 to 1.900)."),
    ],
)  # fmt: skip
def test_what_learns_at_no_rate_is_described_by_its_losses(losses: list[float], said: str) -> None:
    (row,) = lab.rows(runs("lora", *losses))
    assert lab.reason(row, 0.7, 1.0).startswith(said)
