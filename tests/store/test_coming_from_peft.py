"""The page for people who come from Hugging Face PEFT: its blocks run, in order, with the real library."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import peftree
import zoo
from peftree.errors import CALLS, ELSEWHERE
from peftree.named_method import make_method
from peftree.settings import RunConfig, load_config

PAGE = Path(__file__).parents[2] / "docs" / "from-peft.md"


@pytest.mark.filterwarnings("ignore")
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo.build("llama").save_pretrained("my-model")
    batch = {k: v[:2] for k, v in zoo.batch("llama").items() if k in ("input_ids", "attention_mask")}
    known: dict[str, Any] = {"batch": batch}
    blocks = re.findall(r"```py\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), known)
    assert len(blocks) == 8 and known["loss"].isfinite()


def rows() -> list[list[str]]:
    """Return the names in each cell of the table of the trainers' settings: here, TRL, LLaMA-Factory, axolotl."""
    _, _, table = PAGE.read_text("utf-8").partition("| here | TRL |")
    lines = table.partition("\n\n")[0].splitlines()[2:]
    return [[" ".join(re.findall(r"`(\w+)[^`]*`", cell)) for cell in line.split("|")[1:5]] for line in lines]


def test_the_run_file_is_one(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert found is not None
    (tmp_path / "run.yaml").write_text(found[1])
    config = load_config(tmp_path / "run.yaml")
    assert make_method(config) == peftree.get("lora")(r=8, alpha=16, sites="linear") and config.warmup == 0.1


def test_the_trainers_settings_are_named_as_the_errors_name_them() -> None:
    """Where names are for one and the same setting, they stand in the same order in every cell."""
    known = {*RunConfig.model_fields, *peftree.get("lora").model_fields}
    named: dict[str, set[str]] = {}
    for here, *cells in rows():
        for cell in cells:
            for ours, theirs in zip(here.split(), cell.split(), strict=False):
                named.setdefault(theirs, set()).add(ours)
    assert {ours for each in named.values() for ours in each} <= known and len(rows()) == 20
    told = {theirs: ours for theirs, ours in ELSEWHERE.items() if theirs in named}
    assert len(told) > 20 and all(named[theirs] == {ours} for theirs, ours in told.items())


@pytest.mark.slow
def test_the_settings_of_trl_are_its_own() -> None:
    import trl

    theirs = {*trl.SFTConfig.__dataclass_fields__, *inspect.signature(trl.SFTTrainer).parameters}
    theirs |= {*LoraConfig.__dataclass_fields__, *inspect.signature(trl.SFTTrainer.train).parameters, "LoraConfig"}
    assert {name for _, cell, *_ in rows() for name in cell.split()} <= theirs


def test_the_names_that_it_promises_are_answered() -> None:
    model = zoo.build("llama")
    peftree.adapt(model, "lora")
    for name in ("get_peft_model", "LoraConfig", "PeftModel"):
        with pytest.raises(AttributeError, match=re.escape(CALLS[name][:20])):
            getattr(peftree, name)
    with pytest.raises(AttributeError, match="print"):
        model.print_trainable_parameters()
