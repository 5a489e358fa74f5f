"""The matrix of Hugging Face PEFT's files against its ledger, `docs/peft-files.json`: a sample, and the whole."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from peftree.errors import StoreError
from store import peftcases, peftmatrix, peftwrites

ROOT = Path(__file__).parents[2]
LEDGER: dict[str, Any] = json.loads((ROOT / "docs" / "peft-files.json").read_text("utf-8"))
READ = {case.key: case for case in peftcases.READ}
WRITE = {case.key: case for case in peftwrites.WRITE}
SAMPLED = 19  # every so many cases are in the quick suite
REMEDY = "If it got better, run `make peft-page`; if not, fix it."


def check(kind: str, key: str, found: peftmatrix.Outcome) -> None:
    """Compare an outcome with the ledger: the verdict, and the reason of a refusal."""
    verdict, why = LEDGER[kind][key]
    assert found.verdict == verdict, f"{kind} {key}: {found} where the ledger has {verdict} ({why}). {REMEDY}"
    if verdict == "refused":
        assert found.why == why, f"{kind} {key}: {found.why} where the ledger has {why}. {REMEDY}"


@pytest.mark.parametrize("key", list(READ)[::SAMPLED])
def test_a_sample_is_read_as_the_ledger_says(key: str) -> None:
    check("read", key, peftmatrix.read(READ[key]))


@pytest.mark.parametrize("key", list(WRITE)[::SAMPLED])
def test_a_sample_is_written_as_the_ledger_says(key: str) -> None:
    check("write", key, peftmatrix.write(WRITE[key]))


@pytest.mark.slow
def test_everything_is_as_the_ledger_says() -> None:
    assert importlib.metadata.version("peft") == LEDGER["peft"], "the oracle changed; run `make peft-page`"
    faults = []
    for kind, cases, run in (("read", READ, peftmatrix.read), ("write", WRITE, peftmatrix.write)):
        for key, case in cases.items():
            try:
                check(kind, key, run(case))
            except AssertionError as error:
                faults.append(str(error))
    assert not faults, "\n".join(faults)


def test_the_ledger_has_every_case_and_every_reason_is_documented() -> None:
    assert set(LEDGER["read"]) == set(READ)
    assert set(LEDGER["write"]) == set(WRITE)
    given = {why for kind in ("read", "write") for verdict, why in LEDGER[kind].values() if verdict == "refused"}
    assert given <= set(peftmatrix.REASONS)
    page = (ROOT / "docs" / "peft-files.md").read_text("utf-8")
    assert all(f"| {name} | {says} |" in page for name, (says, _) in peftmatrix.REASONS.items())


def test_nothing_is_known_to_be_wrong() -> None:
    wrong = [
        f"{kind} {key}"
        for kind in ("read", "write")
        for key, (verdict, _) in LEDGER[kind].items()
        if verdict == "wrong"
    ]
    assert not wrong


def test_a_difference_and_a_refusal_without_a_reason_count_as_wrong() -> None:
    assert peftmatrix.refused(StoreError("something new", "try again")).verdict == "wrong"
    key = next(k for k, (verdict, _) in LEDGER["read"].items() if verdict == "right")
    with pytest.raises(AssertionError, match="where the ledger has"):
        check("read", key, peftmatrix.Outcome("wrong", "1.0e-1 apart"))
