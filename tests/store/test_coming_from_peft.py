"""The page for people who come from Hugging Face PEFT: its blocks run, in order, with the real library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import peftree
import zoo
from peftree.errors import CALLS

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
    assert len(blocks) == 7 and known["loss"].isfinite()


def test_the_names_that_it_promises_are_answered() -> None:
    model = zoo.build("llama")
    peftree.adapt(model, "lora")
    for name in ("get_peft_model", "LoraConfig", "PeftModel"):
        with pytest.raises(AttributeError, match=re.escape(CALLS[name][:20])):
            getattr(peftree, name)
    with pytest.raises(AttributeError, match="print"):
        model.print_trainable_parameters()
