"""The page of exit codes is what the commands do: every error by its class, interrupts, bad flags, a failed check."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import peftree
from peftree import describe, doctor
from peftree.cli import main
from peftree.errors import PeftreeError, PeftreeWarning
from peftree.printing import EXITS

PAGE = Path(__file__).parents[1] / "docs" / "exit-codes.md"


def rows() -> dict[int, tuple[str, set[str]]]:
    """The page's table: meaning and error classes by code."""
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in PAGE.read_text("utf-8").splitlines() if "|" in line]
    return {int(c): (text, {n.strip() for n in names.split(",") if n.strip()}) for c, text, names in cells[2:]}


def classes(base: type[PeftreeError] = PeftreeError) -> Iterator[type[PeftreeError]]:
    """Every error of ours."""
    yield base
    for kind in base.__subclasses__():
        yield from classes(kind)


OURS = sorted({k for k in classes() if k.__module__ == "peftree.errors"}, key=lambda k: k.__name__)


def test_a_warning_of_ours_is_a_note(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of others it keeps its place in the code, by which it can be reported."""

    def warns() -> None:
        warnings.warn("Packing changed one.", PeftreeWarning, stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)

    monkeypatch.setattr("peftree.cli.app", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "_showwarnmsg_impl", lambda m: sys.stderr.write(warnings._formatwarnmsg(m)))
        main()
    said = capsys.readouterr().err
    assert said.startswith("note: Packing changed one.\n")
    assert "test_exit_codes.py" in said and "FutureWarning: old" in said


def code(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run a command as the shell would; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["peftree", *words])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_the_page_is_the_table_of_the_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert {c: text for c, (text, _) in rows().items()} == EXITS
    assert code(monkeypatch, "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert [c for c, text in EXITS.items() if f"{c} {text}" not in told] == []


@pytest.mark.parametrize("kind", OURS, ids=lambda k: k.__name__)
def test_an_error_ends_with_the_code_of_its_row(kind: type[PeftreeError], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str) -> Any:
        raise kind("It broke.", "Fix it.")

    monkeypatch.setattr(describe, "inspect_model", fail)
    row = [c for c, (_, names) in rows().items() if kind.__name__ in names]
    assert row == [code(monkeypatch, "inspect", "x")]


def test_the_rest_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {n for _, names in rows().values() for n in names} == {k.__name__ for k in OURS}
    assert code(monkeypatch, "inspect") == code(monkeypatch, "nosuch") == code(monkeypatch, "plan", "--nosuch") == 2
    failed = [doctor.Finding("torch", "missing", "install it", failed=True)]
    monkeypatch.setattr(doctor, "examine", lambda: failed)
    assert code(monkeypatch, "doctor") == 1

    def stop(source: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(describe, "inspect_model", stop)
    assert code(monkeypatch, "inspect", "x") == 130


def test_the_package_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["peftree", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("peftree", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out.strip()) == (0, peftree.__version__)
