"""Others write an adapted model: `save_pretrained` and a plain Trainer's checkpoints hold the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import peftree
import zoo
from graft.helpers import far, put, run
from peftree.errors import AdapterError


def test_save_pretrained_writes_the_adapter(tmp_path: Path) -> None:
    model = zoo.build("llama")
    base = run("llama", model)
    put(model, "lora", std=0.3)
    want = run("llama", model)
    model.save_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / "config.json").exists()
    other = zoo.build("llama")
    peftree.load(other, tmp_path / "one")
    assert torch.equal(run("llama", other), want)
    put(model, "ia3", name="second", std=0.3)
    model.save_pretrained(tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["default", "second"]
    with pytest.raises(AdapterError, match="from_pretrained"):
        put(model, "prompt_tuning", name="third", length=3).model.model.save_pretrained(tmp_path / "part")  # type: ignore[union-attr,operator]
    assert not (tmp_path / "part").exists()
    peftree.detach(model)
    model.save_pretrained(tmp_path / "base")
    assert torch.equal(run("llama", tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")), base)


def test_a_merged_model_is_written_whole(tmp_path: Path) -> None:
    model = zoo.build("llama")
    put(model, "lora", std=0.3)
    want = run("llama", model)
    peftree.merge(model)
    model.save_pretrained(tmp_path / "whole")
    whole, report = tf.LlamaForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert far(run("llama", whole), want) < 1e-4 and not report["unexpected_keys"]


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.arange(5) + i
        return {"input_ids": ids, "labels": ids}


def trained(model: nn.Module, folder: Path, **more: Any) -> nn.Module:
    settings = tf.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.05, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = tf.Trainer(model, settings, train_dataset=Rows())
    trainer.train(**more)
    trainer.save_model(str(folder / "last"))
    return model.eval()


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_a_plain_trainers_checkpoint_is_small_and_resumes(tmp_path: Path, method: str) -> None:
    model = zoo.build("llama")
    peftree.adapt(model, method)
    want = run("llama", trained(model, tmp_path))
    files = list((tmp_path / "checkpoint-2").glob("*.safetensors"))
    size = sum(p.numel() for p in peftree.adapters(model)["default"].parameters())
    assert len(files) == 2 and all(f.stat().st_size < 4 * size + 12000 for f in files)
    other = zoo.build("llama")
    peftree.load(other, tmp_path / "last")
    assert torch.equal(run("llama", other), want)
    again = zoo.build("llama")
    peftree.adapt(again, method)
    got = run("llama", trained(again, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2")))
    assert far(got, want) < 1e-6
