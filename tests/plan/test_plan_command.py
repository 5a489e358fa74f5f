"""`peftree plan` as a user calls it: text, JSON, table, page; budgets and bad input."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from peftree import registry
from peftree.cli import app
from peftree.errors import ConfigError, DataError
from peftree.plan import Request, fit, plan
from peftree.settings import read_settings
from plan.test_fit import LLAMA, SHORT, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, LLAMA)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory, SHORT)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_holds_the_whole_plan(folder: Path) -> None:
    said = json.loads(run(str(folder), "method=lora", "r=4", "batch_size=2", "max_length=16", "--json"))
    assert said["how"] == "traced" and said["request"]["method"]["fields"] == {"r": 4}
    assert said["trainable"] == 4 * 4 * ((64 + 64) + (64 + 32))  # 4 layers, r=4: q and v
    assert sum(said["parts"].values()) == said["low"] == max(said["phases"].values())
    assert said["low"] <= said["expected"] <= said["high"]


@pytest.mark.slow
def test_a_budget_says_what_fits_and_how(short: Path) -> None:
    words = (str(short), "method=lora", "batch_size=16", "max_length=64", "device=cpu")
    said = run(*words, "--memory", "8MB")
    assert "does not fit into" in said and "largest batch" in said and "way 1: " in said
    assert "fits into" in run(*words, "--memory", "8GiB")


def test_a_page_is_written_and_asks_for_nothing(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    run(str(folder), "method=dora", "--html", str(page))
    text = page.read_text()
    assert "What the peak is made of" in text and "dora" in text and "http" not in text


@pytest.mark.slow
def test_without_a_method_all_are_in_a_table(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "BATCHES", (1,))
    every = registry.methods()  # a planned one takes a second
    some = {name: every[name] for name in ("full", "lora", "head_only", "vpt", *list(every)[::10])}
    monkeypatch.setattr(registry, "methods", cache(lambda: some))
    cells = json.loads(run(str(short), "max_length=48", "--json"))
    found = {c["method"]: c["expected"] for c in cells if c["batch"] == 1}
    assert found["full"] > found["lora"] > found["head_only"] and found["vpt"] is None
    assert found.keys() == some.keys()


def test_a_table_has_a_row_for_a_method_and_says_which_are_left_out(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "BATCHES", (1, 2))
    some = {name: registry.get(name) for name in ("lora", "vpt", "full")}
    monkeypatch.setattr(registry, "methods", cache(lambda: some))
    said = run(str(short), "max_length=16")
    assert said.index("full") < said.index("lora") and said.split().count("16") == 2
    assert "Not for this model: vpt." in said and "is next" not in said and "…" not in said
    cells = [c["expected"] for c in json.loads(run(str(short), "max_length=16", "--json")) if c["expected"]]
    budget = sorted(cells)[1]
    marked = run(str(short), "max_length=16", "--memory", f"{budget}B")
    assert sum(word[:1].isdigit() and word.endswith("x") for word in marked.split()) == len(cells) - 2
    assert "x: more than the budget" in marked and "x: more" not in said


def test_a_table_shows_of_each_column_what_is_named(short: Path) -> None:
    cells = json.loads(run(str(short), "method=ia3", "batch_size=2", "max_length=16", "--table", "--json"))
    assert [(c["method"], c["batch"], c["length"]) for c in cells] == [("ia3", 2, 16)]
    cells = json.loads(run(str(short), "method=ia3", "max_length=16", "--table", "--json"))
    assert {c["method"] for c in cells} == {"ia3"} and len(cells) == len(fit.BATCHES)


def test_data_give_the_length(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\n" + "".join(f"say {'x' * n},{'y' * n}\n" for n in (8, 40, 24)))
    said = json.loads(run(str(folder), "method=lora", f"data={rows}", "--json"))
    assert (
        said["request"]["max_length"] == len(f"say {'x' * 40} {'y' * 40}") // 4
    )  # no tokenizer: four characters a token


def test_columns_of_ones_own_are_named_as_the_error_says(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("review,stars\n" + "".join(f"{'x' * n},{n % 4}\n" for n in (80, 82, 160, 160, 160)))
    words = ("plan", str(folder), "method=lora", f"data={rows}")
    refused = CliRunner().invoke(app, list(words)).exception
    assert isinstance(refused, DataError)
    advised = re.findall(r"data\.columns\.\w+=\w+", refused.fix)
    theirs = [w.replace("your_column", "review").replace("your_other_column", "stars") for w in advised]
    assert theirs == ["data.columns.text=review", "data.columns.label=stars"]
    said = json.loads(run(*words[1:], "--json", *theirs))
    assert said["request"]["max_length"] == 160 // 4, "a label does not count towards the row"


def test_rows_without_a_completion_have_no_length(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\n" + "".join(f"say,{'y' * 40}\n" for _ in range(3)) + f"{'x' * 90},\n")
    words = (str(folder), "method=lora", f"data={rows}", "--json")
    assert isinstance(CliRunner().invoke(app, ["plan", *words]).exception, DataError), "as in training"
    said = json.loads(run(*words, "data.skip_empty=true"))
    assert said["request"]["max_length"] == len(f"say {'y' * 40}") // 4


def test_images_have_no_length(folder: Path, tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for n in range(2):
            Image.new("RGB", (8, 8), (40 * n, 90, 200)).save(tmp_path / label / f"{n}.png")
    refused = CliRunner().invoke(app, ["plan", str(folder), "method=lora", f"data={tmp_path}"]).exception
    assert isinstance(refused, ConfigError) and "no model for image-classification" in str(refused)


def test_a_run_file_is_planned_as_it_would_be_trained(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\n" + "".join(f"say {'x' * n},{'y' * n}\n" for n in (8, 40, 24, 30)))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {folder}\ndata: {rows}\nmethod: {{name: lora, r: 4}}\nbatch_size: 2\nepochs: 9\n")
    said = json.loads(run(str(file), "--json"))
    asked = said["request"]
    assert (asked["batch_size"], asked["task"], asked["dtype"]) == (2, "generation", "float32")
    assert asked["max_length"] == 21 and said["trainable"] == 4 * 4 * ((64 + 64) + (64 + 32))
    changed = json.loads(run(str(file), "--json", "r=8", "max_length=12"))
    assert changed["trainable"] == 2 * said["trainable"] and changed["request"]["max_length"] == 12


def test_a_wrong_field_in_a_run_file_is_named_with_its_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {folder}\ndata: nowhere.csv\nmethod:\n  name: lora\n  rank: 4\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:5: lora has no field 'rank'"):
        run(str(file))
    with pytest.raises(ConfigError, match=r"run\.yaml:5: lora has no field 'rank'"):
        plan(read_settings(Request, file))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["method=lorra"], ["lorra", "lora"]),
        (["method=lora", "rr=4"], ["'rr=4': lora has no field 'rr'"]),
        (["r=0"], ["'r=0': lora: r=0"]),
        (["--table", "batch=8"], ["'batch=8': lora has no field 'batch'", "Write batch_size"]),
        (["base=nf4"], ["'base=nf4': lora has no field 'base'", "Write quantize"]),
        (["method=lora", "r"], ["'r' is not an override", "r=32"]),
        (["method=lora", "--set", "r=4"], ["There is no option --set", "key=value: r="]),
        (["--batch", "4"], ["There is no option --batch", "key=value: batch_size="]),
        (["--no-padded"], ["There is no option --no-padded"]),
        (["checkpointing=true"], ["checkpointing", "Write activations"]),
        (["method=lora", "--memory", "lots"], ["'lots' is not an amount of memory", "24GB"]),
        (["method=lora", "--memory", "1KB"], ["even in 4 bits"]),
        (["method=lora", "--memory", "24"], ["'24' has no unit", "24GB", "24GiB"]),
        (["--memory", "24576"], ["'24576' has no unit", "24576MB"]),
        (["method=lora", "dtype=int3"], ["int3", "bfloat16"]),
        (["method=lora", "devices=2"], ["devices=2", "shard=ddp"]),
        (["method=lora", "task=image-classification"], ["LlamaConfig has no model for image-classification"]),
        (["method=vpt"], ["vision"]),
    ],
)
def test_bad_input_is_one_clear_error(folder: Path, words: list[str], parts: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", str(folder), *words])
    assert result.exception is not None and isinstance(result.exception, ValueError)
    for part in parts:
        assert part in str(result.exception)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "method=lora"])
    assert isinstance(result.exception, ConfigError) and "has no config.json" in str(result.exception)
