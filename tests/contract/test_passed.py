"""What the record of the contract says of a method follows its file, and the files that it is made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import peftree
from contract import passed
from contract.test_contract import CHANGED, METHODS
from peftree import registry

KEYS = {name: passed.key(name) for name in METHODS}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = shutil.copytree(Path(peftree.__file__).parent / "methods", tmp_path / "methods")
    monkeypatch.setattr(passed, "METHODS", copied)
    monkeypatch.setattr(passed, "record", KEYS.copy)
    return copied


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("additive/ia3.py", {"ia3"}),
        ("additive/p_tuning_v2.yaml", {"p_tuning_v2"}),
        ("additive/prefix_tuning.py", {"prefix_tuning", "p_tuning_v2", "mam", "s4", "unipelt"}),
    ],
)
def test_a_method_is_due_when_its_file_or_one_that_it_is_made_from_changes(
    files: Path, file: str, changed: set[str]
) -> None:
    assert not [name for name in METHODS if passed.changed(name)]
    with (files / file).open("a") as there:
        there.write("# one more line\n")
    assert {name for name in METHODS if passed.changed(name)} == changed


def test_a_new_method_is_due(files: Path) -> None:
    (files / "additive" / "brand_new.py").write_text("")
    assert passed.changed("brand_new") and passed.changed("of_another_package")


def test_the_record_is_of_methods_that_there_are() -> None:
    gone = set(json.loads(passed.RECORD.read_text())) - set(registry.methods())
    assert not gone, f"run `make contract`, which forgets {gone}"
    assert {name for name in METHODS if passed.record().get(name) != KEYS[name]} == set(CHANGED)
