"""The benchmark's page is what its JSON gives, and was measured with the code as it is, or confirmed for it."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
from tools import bench_page as page
from tools import hot_code

ROOT = Path(__file__).parents[1]
SECTIONS, NEGATIVE = page.stated()
NOW = {code: hot_code.digest(code) for code in {section.code for section in SECTIONS.values()}}
STEP = SECTIONS["step"]
MACHINE = {"cpu": "x", "torch": "1"}
CODE = '''"""Doc."""


class A(dict[str, int]):
    """Prose."""

    def f(self, x: int, *, y: str = "a") -> str:
        """Return it."""
        more = {**self, "b": x + 1, None: [lambda *a: a[1:], -1e-9, 0x10, b"b", ...]}  # why
        match more:
            case {"b": int(n), **rest} if n:
                return f"{n!r:>{x}} {rest}" "c"
        return y
'''


def record(**changed: Any) -> dict[str, Any]:
    """Return a made-up record of one row."""
    row = {"row": "smol, lora all", "peftree": [0.90, 0.88, 0.92], "again": [1.0, 0.99, 1.02], "peft peak_bytes": 200}
    row |= {"peftree peak_bytes": 100, **changed}
    return {"date": "d", "rounds": 9, "seconds": 1, "code": "old", "machine": MACHINE, "rows": [row]}


def package(folder: Path, text: str) -> Path:
    """Write a package with one file of each folder that sections name, and return it."""
    for name in {each for section in SECTIONS.values() for each in section.code}:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "a.py").write_text(text, "utf-8")
    return folder


def test_the_code_is_not_newer_than_the_figures() -> None:
    assert not (found := page.outdated(page.load())), "\n" + "\n".join(found.values())


def test_page_figures_and_json_are_current() -> None:
    data = page.load()
    assert page.DATA.read_text("utf-8") == page.dump(data)
    made = page.files(data)
    assert len(made) > 2
    for name, content in made.items():
        assert (page.DOCS / name).read_text("utf-8") == content, f"{name}: run `make bench-page`"
    for name in (n for n in made if n.endswith(".svg")):
        ElementTree.fromstring(made[name])
    changed = copy.deepcopy(data)
    changed["mixed"]["rows"][0]["mixed"][0] += 1
    assert page.page(changed) != made["bench.md"]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_rows_of_a_section_hold_what_it_shows(name: str) -> None:
    section, rows = SECTIONS[name], page.load()[name]["rows"]
    assert len({row["row"] for row in rows}) == len(rows) > 1 and set(section.confirm) <= {row["row"] for row in rows}
    for key in section.columns:
        assert any(page.value(row, key) is not None for row in rows), key
    for row in rows:
        for key, value in row.items():
            numbers = value if isinstance(value, list) else [0, 0, 0]
            assert isinstance(value, str | int | float | list | None) and len(numbers) == 3, (key, value)
            assert not isinstance(value, list) or value[1] <= value[0] <= value[2], (key, value)
            assert not key.endswith("_bytes") or (type(value) is int and value > 0), (key, value)


def test_every_result_without_gain_names_its_record() -> None:
    assert len(NEGATIVE) > 3
    assert all((page.DOCS / "decisions" / each["record"]).is_file() for each in NEGATIVE)


def test_the_hash_sees_code_and_not_prose(tmp_path: Path) -> None:
    def found(text: str) -> str:
        return hot_code.digest(("deltas",), package(tmp_path, text))

    first = found(CODE)
    assert first == "10a1afe157bf2171", (
        "another version of Python writes the tree in another way: mend tools/hot_code.py"
    )
    for prose in (
        CODE.replace("Return", "Give"),
        CODE.replace("  # why", ""),
        CODE.replace('        """Return it."""\n', ""),
    ):
        assert prose != CODE and found(prose) == first
    for code in (CODE.replace("+ 1", "+ 2"), CODE.replace("x +", "x -"), CODE.replace("*, y", "y"), CODE + "A()\n"):
        assert code != CODE and found(code) != first
    (tmp_path / "deltas" / "a.py").rename(tmp_path / "deltas" / "b.py")
    assert hot_code.digest(("deltas",), tmp_path) != first


def test_a_section_that_the_code_left_behind_names_the_commands(tmp_path: Path) -> None:
    root = package(tmp_path, CODE)
    data = {name: {**record(), "code": hot_code.digest(section.code, root)} for name, section in SECTIONS.items()}
    assert page.outdated(data, root) == {}
    del data["rss"]
    data["mixed"]["code"] = "old"
    found = page.outdated(data, root)
    assert set(found) == {"mixed", "rss"} and "not measured yet" in found["rss"]
    assert "`make bench SECTION=mixed`" in found["mixed"] and "`make bench-confirm`" in found["mixed"]
    package(tmp_path, CODE.replace("+ 1", "+ 2"))
    assert set(page.outdated(data, root)) == set(SECTIONS)


@pytest.mark.parametrize(
    ("again", "words"),
    [
        ({}, ""),
        ({"peftree": [0.94, 0.93, 0.95]}, ""),  # within the quartiles and the noise
        ({"peftree": [0.96, 0.95, 0.97]}, "time 0.960, outside 0.850 to 0.950"),
        ({"peftree": [0.84, 0.83, 0.85]}, "time 0.840, outside"),  # better is not what the page says either
        ({"peftree": [0.96, 0.95, 0.97], "again": [1.0, 0.95, 1.05]}, ""),  # a machine that is noisy now
        ({"peftree peak_bytes": 101}, "peftree peak_bytes 100, now 101"),
        ({"peft peak_bytes": 199}, "peft peak_bytes 200, now 199"),
    ],
)
def test_rows_measured_again_confirm_the_page_or_not(again: dict[str, Any], words: str) -> None:
    found = page.faults(STEP, record(), record(**again))
    assert (not found) if not words else len(found) == 1 and words in found[0], found


def test_other_versions_confirm_nothing_and_another_processor_may() -> None:
    assert not page.faults(STEP, record(), {**record(), "machine": {**MACHINE, "cpu": "y"}})
    (found,) = page.faults(STEP, record(), {**record(), "machine": {**MACHINE, "torch": "2"}})
    assert "torch 1, here 2" in found and "make bench" in found


@pytest.fixture
def driver() -> ModuleType:
    """The script that measures and confirms."""
    spec = importlib.util.spec_from_file_location("bench_driver", ROOT / "benchmarks" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("same", [True, False])
def test_confirming_writes_the_new_hash_only_if_the_rows_agree(
    same: bool, driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "DATA", tmp_path / "bench.json")
    data = dict[str, Any]()
    for name, section in SECTIONS.items():
        data[name] = {**record(), "code": NOW[section.code]}
        one = {**record()["rows"][0], section.ratio: [0.9, 0.88, 0.92]}
        data[name]["rows"] = [{**one, "row": row} for row in section.confirm]
    data["growth"]["code"] = "old"
    driver.store(data)
    before = page.DATA.read_bytes()

    def measured(section: page.Section, rounds: int, only: tuple[str, ...]) -> dict[str, Any]:
        assert only == section.confirm and rounds > 1
        found = copy.deepcopy(next(data[name] for name in SECTIONS if SECTIONS[name].title == section.title))
        found["rows"][-1]["peftree peak_bytes"] += not same
        return found

    monkeypatch.setattr(driver, "measured", measured)
    assert driver.confirm(page.load()) == (not same)
    said = capsys.readouterr().out
    if same:
        count = sum(len(section.confirm) for section in SECTIONS.values())
        growth = page.load()["growth"]
        assert growth["code"] == NOW[hot_code.FOLDERS] and f"by {count} rows" in growth["confirmed"]
        assert "confirmed" not in page.load()["mixed"]
    else:
        assert "Not confirmed" in said and "100, now 101" in said and page.DATA.read_bytes() == before


def test_confirming_measures_nothing_where_nothing_changed(
    driver: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(page, "DATA", tmp_path / "bench.json")
    data = {name: {**record(), "code": NOW[section.code]} for name, section in SECTIONS.items()}
    monkeypatch.setattr(driver, "measured", None)
    assert driver.confirm(data) == 0
    data["rss"]["small"] = True
    assert driver.confirm(data) == 1
    del data["rss"]
    assert driver.confirm(data) == 1


def test_the_check_imports_no_torch() -> None:
    run = "import sys\nfrom tools import bench_page as page\npage.outdated(page.load())\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(("key", "value", "text"), [
    ("mixed", [0.9, 0.88, 0.92], "0.900 (0.880-0.920)"), ("a_bytes", 1 << 20, "1.00 MiB"), ("trainable", 1234, "1,234"),
    ("a_bytes / b_bytes", 0.5, "0.500"), ("seconds", 0.01234, "0.0123"), ("goal", "", ""), ("low", None, "-"),
    ("mixed", [0.9, 0.9, 0.9], "0.900"),
])  # fmt: skip
def test_a_value_is_written_with_its_unit(key: str, value: Any, text: str) -> None:
    assert page.cell(key, value) == text


def test_a_ratio_within_the_noise_is_no_difference() -> None:
    row = {"peftree": [0.995, 0.9, 1.0], "again": [1.0, 0.99, 1.01]}
    assert page.said(row) == "the same time within noise"
    assert page.said(row | {"peftree": [0.9, 0.8, 0.91]}) == "0.90 of the time"


def test_what_was_only_tried_is_said_and_not_quoted() -> None:
    made = {"lora all": [0.5, 0.4, 0.6], "dora all": [0.7, 0.6, 0.8]}
    rows = [
        {"row": n, "chunked": r, "again": [1, 1, 1], "chunked peak_bytes": 1, "peft peak_bytes": 4}
        for n, r in made.items()
    ]
    data = {"whole": {**record(), "rows": rows}}
    assert page.facts(data).startswith("LoRA takes 0.25 of the peak memory and 0.50 of the time; DoRA takes")
    assert page.SMALL not in page.body("whole", data["whole"])
    data["whole"]["small"] = True
    assert page.facts(data).startswith(page.UNMEASURED) and page.SMALL in page.body("whole", data["whole"])
    assert page.UNMEASURED in page.loss(data) and page.UNMEASURED in page.speed(data)
