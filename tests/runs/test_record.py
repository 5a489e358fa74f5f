"""The record of a run: addresses, round trips, runs as records, and one clear error for each kind of damage."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import house
from invented import fabricated
from peftree.errors import DataError, TrainError
from peftree.runs.read import parse_record, read_packed, read_record, read_records, read_results
from peftree.runs.record import CurvePoint, Run, RunRecord, file_name, run_key

ROOT = Path(__file__).parents[2]
ADDRESSES = "5628c1ea09fc09df118d1fe37508259488815a38612d4eb362ba08495b4b89cc"  # of the committed pack, in its order


RAN = Run(
    task="text-classification", model="/models/bert", method="lora", branch="reparameterized", fields={"r": 8},
    learning_rate=0.01, seed=3, metric="accuracy", split="test", score=0.5, items=(0.0, 1.0), steps=4, batch_size=2,
    output="runs/a", throughput=3.5, throughput_unit="tokens/s",
)  # fmt: skip
PLANNED: dict[str, Any] = {
    "suite": "small", "task": "reviews", "dataset": "d", "model": "bert", "modality": "language",
    "kind": "understanding", "method": "lora", "branch": "reparameterized", "fields": {"r": 8}, "seed": 3,
    "learning_rate": 0.01, "metric": "accuracy", "phase": "trial", "budget": {"steps": 4},
}  # fmt: skip
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_the_record_of_a_run_holds_what_it_found_under_the_names_that_were_planned() -> None:
    record = RunRecord.of(RAN, PLANNED, NOW, probes={"latency": {"on": 1.0}})
    changed = {name for name in Run.model_fields if getattr(record, name) != getattr(RAN, name)}
    assert changed == {"task", "model", "output"}, "the folder is not in the record"
    assert {name: getattr(record, name) for name in PLANNED} == PLANNED
    assert record.status == "ok" and record.probes and record.key == run_key(PLANNED)


@pytest.mark.parametrize("other", [{"seed": 4}, {"fields": {"r": 9}}, {"metric": "mae"}, {"learning_rate": 0.1}])
def test_a_run_that_is_not_the_planned_one_has_no_record(other: dict[str, Any]) -> None:
    with pytest.raises(TrainError, match=next(iter(other))):
        RunRecord.of(RAN, PLANNED | other, NOW)


def trained(folder: Path, found: dict[str, Any]) -> Path:
    """Write what `peftree train` leaves."""
    folder.mkdir()
    (folder / "resolved.yaml").write_text("model: m\ndata: reviews.csv\n")
    (folder / "metrics.json").write_text(json.dumps(found))
    return folder


def test_a_folder_of_a_run_is_read_as_its_record(tmp_path: Path) -> None:
    (record,) = read_results(trained(tmp_path / "a", RAN.metrics()))
    assert {name for name in Run.model_fields if getattr(record, name) != getattr(RAN, name)} == {"output"}
    assert (record.suite, record.dataset, record.kind) == ("own runs", "reviews.csv", "understanding")
    assert record.budget == {"steps": 4, "batch_size": 2}
    # Before the rate had both names and the throughput was measured.
    older = {k: v for k, v in RAN.metrics().items() if k != "learning_rate" and "throughput" not in k}
    assert read_results(trained(tmp_path / "b", older))[0].key == record.key


@pytest.mark.parametrize(("change", "words"), [({"lr": None, "seed": -1}, "seed=-1"), ({"x": 1}, "no key 'x'")])
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=f"metrics.json: .*{words}"):
        read_results(trained(tmp_path / "a", RAN.metrics() | change))
    lacking = {k: v for k, v in RAN.metrics().items() if k != "lr"}
    with pytest.raises(DataError, match=r"metrics\.json is damaged: 'lr' is missing"):
        read_results(trained(tmp_path / "b", lacking))


def test_records_are_read_without_torch() -> None:
    assert not {"torch", "transformers"} & house.loaded_by("import peftree.runs.read", ROOT / "src")


def test_a_record_round_trips_under_its_content_address(tmp_path: Path) -> None:
    record = fabricated()[0]
    path = record.write(tmp_path)
    assert path.name == file_name(record.key)
    assert read_record(path) == record
    assert record.write(tmp_path) == path and len(list(tmp_path.iterdir())) == 1


def test_the_key_changes_with_every_part_of_the_identity() -> None:
    record = fabricated()[0]
    changes: list[dict[str, Any]] = [
        {"suite": "s"}, {"task": "t"}, {"dataset": "d"}, {"data": "h"}, {"model": "m"}, {"method": "x"},
        {"fields": {"r": 9}}, {"budget": {}}, {"learning_rate": 0.5}, {"seed": 99}, {"phase": "trial"},
    ]  # fmt: skip
    keys = {record.model_copy(update=change).key for change in changes} | {record.key}
    assert len(keys) == len(changes) + 1
    assert record.model_copy(update={"score": 0.1}).key == record.key
    one, same = (record.model_copy(update={"learning_rate": rate}) for rate in (1.0, 1))
    assert one.key == same.key  # JSON writes the two in different ways


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scroe": 1}, ["scroe", "Did you mean 'score'"]),
        ({"seed": "x"}, ["seed='x'"]),
        ({"metric": None}, ["metric=None"]),
        ({"branch": "twig"}, ["branch='twig'"]),
        ({"curve": [{"step": 1, "lss": 2}]}, ["no key 'curve.0.lss'", "loss"]),
        ({"schema_version": 7}, ["schema_version", "7"]),
        ({"score": None}, ["status is 'ok' but score is missing"]),
        ({"status": "failed"}, ["error is empty"]),
        ({"seed": 5}, ["not named"]),
    ],
)
def test_a_bad_record_names_file_and_field(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    path = fabricated()[0].write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError) as caught:
        read_records(tmp_path)
    assert all(word in str(caught.value) for word in [*words, str(path)])


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a": NaN}', b"\xff\xfe", b"\x80\x04."])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, damage: bytes) -> None:
    path = fabricated()[0].write(tmp_path)
    path.write_bytes(damage)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_records(tmp_path)


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run records"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        read_records(tmp_path / "absent")


def test_a_diverged_loss_becomes_a_gap_and_still_round_trips(tmp_path: Path) -> None:
    point = CurvePoint(step=3, loss=float("nan"))
    record = fabricated()[0].model_copy(update={"curve": (point,)})
    assert read_record(record.write(tmp_path)).curve[0].loss is None


def test_the_records_of_older_versions_are_read_with_all_they_hold() -> None:
    packed = ROOT / "docs" / "study" / "small.jsonl.gz"
    older = {run_key(data): data for data in map(json.loads, gzip.decompress(packed.read_bytes()).splitlines())}
    found = read_packed(packed)
    assert len(found) == len(older) > 2000 and sum("energy" in data["probes"] for data in older.values()) > 2000
    assert hashlib.sha256("\n".join(r.key for r in found).encode()).hexdigest() == ADDRESSES
    for record in found:
        was, today = older[record.key], record.model_dump(mode="json")
        assert was["probes"].pop("energy", {"not measured": ""}).keys() == {"not measured"}
        added = {name: today.pop(name) for name in set(today) - set(was)}
        assert all(value in (None, "", [], {}) for value in added.values()), "added since, so not known"
        assert today.pop("started")[:19] == was.pop("started")[:19]
        assert today == was


def test_an_energy_that_was_measured_stays_in_its_record(tmp_path: Path) -> None:
    record = fabricated()[0]
    for energy, kept in (({"not measured": "No counter."}, False), ({"joules": 3.0}, True)):
        path = record.model_copy(update={"probes": {"energy": energy}}).write(tmp_path)
        assert ("energy" in read_record(path).probes) is kept


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello", "p.gz:1 is not a run record"),
        ("[1]", "p.gz:1 is not a run record"),
        ("", "holds no run records"),
    ],
)
def test_a_damaged_pack_is_one_error(tmp_path: Path, text: str, said: str) -> None:
    pack = tmp_path / "p.gz"
    pack.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=said):
        read_results(pack)


@pytest.mark.parametrize("where", ["fields", "budget"])
def test_a_number_that_is_not_finite_is_one_error(where: str) -> None:
    data = fabricated()[0].model_dump(mode="json")
    with pytest.raises(DataError, match=rf"{where}\.r.*finite"):
        parse_record(data | {where: {"r": math.inf}}, "a record")
