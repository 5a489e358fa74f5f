"""`peftree plan` as a user calls it: text, JSON, table, page; budgets and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftree import registry
from peftree.cli import app
from peftree.errors import ConfigError
from peftree.plan import fit
from plan.test_fit import LLAMA, SHORT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("llama")
    LLAMA.save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("short")
    SHORT.save_pretrained(found)
    return found


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_holds_the_whole_plan(folder: Path) -> None:
    said = json.loads(run(str(folder), "--method", "lora", "--set", "r=4", "--batch", "2", "--length", "16", "--json"))
    assert said["how"] == "traced" and said["request"]["fields"] == {"r": 4}
    assert said["trainable"] == 4 * 4 * ((64 + 64) + (64 + 32))  # 4 layers, r=4: q and v
    assert sum(said["parts"].values()) == said["low"] == max(said["phases"].values())
    assert said["low"] <= said["expected"] <= said["high"]


def test_a_budget_says_what_fits_and_how(short: Path) -> None:
    words = (str(short), "--method", "lora", "--batch", "16", "--length", "64", "--device", "cpu")
    said = run(*words, "--memory", "8MB")
    assert "does not fit into" in said and "largest batch" in said and "way 1: " in said
    assert "fits into" in run(*words, "--memory", "8GiB")


def test_a_page_is_written_and_asks_for_nothing(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    run(str(folder), "--method", "dora", "--html", str(page))
    text = page.read_text()
    assert "What the peak is made of" in text and "dora" in text and "http" not in text


def test_without_a_method_all_are_in_a_table(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "BATCHES", (1,))
    cells = json.loads(run(str(short), "--length", "48", "--json"))
    found = {c["method"]: c["expected"] for c in cells if c["batch"] == 1}
    assert found["full"] > found["lora"] > found["head_only"] and found["vpt"] is None


def test_a_table_has_a_row_for_a_method_and_says_which_are_left_out(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "BATCHES", (1, 2))
    some = {name: registry.get(name) for name in ("lora", "vpt", "full")}
    monkeypatch.setattr(registry, "methods", lambda: some)
    said = run(str(short), "--length", "16")
    assert said.index("full") < said.index("lora") and said.split().count("16") == 2
    assert "Not for this model: vpt." in said and "is next" not in said and "…" not in said


def test_data_give_the_length(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\n" + "".join(f"say {'x' * n},{'y' * n}\n" for n in (8, 40, 24)))
    said = json.loads(run(str(folder), "--method", "lora", "--data", str(rows), "--json"))
    assert said["request"]["length"] == len(f"say {'x' * 40} {'y' * 40}") // 4  # no tokenizer: four characters a token


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method", "lorra"], ["lorra", "lora"]),
        (["--method", "lora", "--set", "rr=4"], ["rr"]),
        (["--method", "lora", "--set", "r"], ["--set 'r' sets nothing"]),
        (["--method", "lora", "--memory", "lots"], ["'lots' is no amount of memory", "24GB"]),
        (["--method", "lora", "--memory", "1KB"], ["even in 4 bits"]),
        (["--method", "lora", "--dtype", "int3"], ["int3", "bfloat16"]),
        (["--method", "lora", "--devices", "2"], ["devices=2", "shard=ddp"]),
        (["--method", "lora", "--task", "image-classification"], ["LlamaConfig has no model for image-classification"]),
        (["--method", "vpt"], ["vision"]),
    ],
)
def test_bad_input_is_one_clear_error(folder: Path, words: list[str], parts: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", str(folder), *words])
    assert result.exception is not None and isinstance(result.exception, ValueError)
    for part in parts:
        assert part in str(result.exception)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--method", "lora"])
    assert isinstance(result.exception, ConfigError) and "has no config.json" in str(result.exception)
