"""Adapters train without our trainer: under transformers' own, and in a loop of five lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import peftree
from peftree.data.rows import load_data
from peftree.tasks import Task, build_task


@pytest.fixture
def task(decoder: str, prompt_data: Path) -> Task:
    return build_task(decoder, load_data(prompt_data))


def test_plain_trainer_trains_an_adapter(task: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(task.model, "lora", lr_ratio=4.0)
    base = {n: p.clone() for n, p in task.model.named_parameters() if not p.requires_grad}
    items = task.items(load_data(prompt_data).train)
    args = TrainingArguments(
        str(tmp_path), max_steps=30, per_device_train_batch_size=8, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, save_strategy="no", logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    before = task.score(items).score
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=1e-2))
    Trainer(task.model, args, train_dataset=items, data_collator=task.collate, optimizers=(optimizer, None)).train()
    assert task.score(items).score < 0.7 * before
    assert all(torch.equal(p, base[n]) for n, p in task.model.named_parameters() if n in base)


def test_five_lines_train_an_adapter(task: Task, prompt_data: Path) -> None:
    adapter = peftree.adapt(task.model, "lora")
    items = task.items(load_data(prompt_data).train)
    before = task.score(items).score

    optimizer = torch.optim.AdamW(adapter.param_groups(lr=1e-2))
    for _ in range(6):
        for batch in task.batches(items, batch_size=8):
            task.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    assert task.score(items).score < 0.7 * before
