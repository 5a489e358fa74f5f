"""The page on other trainers: its blocks run in order with the real libraries, and its table is that of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import peftree
from ecosystem.common import saved
from peftree import registry
from peftree.methods.contract import Composed, Method

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
LOOP = 2  # blocks before the first that needs another library


def run_blocks(page: Path, folder: Path, known: dict[str, Any], most: int | None = None) -> int:
    """Run the first `most` Python blocks of a page, with `my-model` in `folder`; return how many there are."""
    saved(folder / "my-model")
    blocks = re.findall(r"```py\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for number, block in enumerate(blocks[:most], 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), known)
    return len(blocks)


def opens(folder: str, model: Any, batch: Any) -> bool:
    """Return whether the adapter in `folder` gives the outputs of `model` on a fresh base."""
    fresh = tf.AutoModelForCausalLM.from_pretrained("my-model").eval()
    peftree.load(fresh, folder)
    with torch.no_grad():
        return torch.equal(fresh(**batch).logits, model.eval()(**batch).logits)


def test_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    run_blocks(PAGE, tmp_path, known, LOOP)
    assert known["losses"][-1] < known["losses"][0]
    assert opens("from-a-loop", known["model"], known["batch"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other libraries, in code that users write without a filter
def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    assert run_blocks(PAGE, tmp_path, known) == 6
    model = known["model"]
    bare = tf.AutoModelForCausalLM.from_pretrained("my-model").state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in bare.items())
    assert not known["adapter"].unused()
    assert opens("from-lightning", model, known["batch"])
    kept = list(Path("lightning").rglob("*.ckpt"))
    assert len(kept) == 1 and kept[0].stat().st_size < Path("my-model/model.safetensors").stat().st_size


@pytest.mark.parametrize("hook", ["init", "optimizer", "aux_loss", "before_step", "schedule"])
def test_the_table_of_hooks(hook: str) -> None:
    def has(method: Method) -> bool:
        passed_on = (getattr(Method, hook), getattr(Composed, hook))
        return any(getattr(type(p), hook) not in passed_on for p in (method, *method.parts()))

    want = ", ".join(f"`{n}`" for n in sorted(registry.methods()) if has(registry.get(n)()))
    called = "`start`, `step`" if hook == "schedule" else f"`{hook}`"
    assert f": {want} | {called} |" in PAGE.read_text("utf-8")
