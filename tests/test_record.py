"""Run records: content addresses, round trips, and one clear error for each kind of damage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from peftree.bench.record import CurvePoint, file_name, read_record, read_records
from peftree.errors import DataError
from test_report import fabricated


def test_a_record_round_trips_under_its_content_address(tmp_path: Path) -> None:
    record = fabricated()[0]
    path = record.write(tmp_path)
    assert path.name == file_name(record.key)
    assert read_record(path) == record
    assert record.write(tmp_path) == path and len(list(tmp_path.iterdir())) == 1


def test_the_key_changes_with_every_part_of_the_identity() -> None:
    record = fabricated()[0]
    changes: list[dict[str, Any]] = [
        {"suite": "s"}, {"task": "t"}, {"dataset": "d"}, {"model": "m"}, {"method": "x"},
        {"fields": {"r": 9}}, {"budget": {}}, {"learning_rate": 0.5}, {"seed": 99},
    ]  # fmt: skip
    keys = {record.model_copy(update=change).key for change in changes} | {record.key}
    assert len(keys) == len(changes) + 1
    assert record.model_copy(update={"score": 0.1}).key == record.key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scroe": 1}, ["scroe", "Did you mean 'score'"]),
        ({"seed": "x"}, ["field 'seed'"]),
        ({"metric": None}, ["field 'metric'"]),
        ({"branch": "twig"}, ["field 'branch'"]),
        ({"curve": [{"step": 1, "lss": 2}]}, ["field 'curve.0.lss'"]),
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
