"""Tiny models, tokenizers and rows that the tests of training share."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import TrainerCallback, TrainingArguments

from peftree.adapter import Adapter
from peftree.data.rows import load_data
from peftree.tasks import Task
from peftree.train.trainer import AdapterTrainer

WORDS = ["good", "fine", "great", "nice", "bad", "poor", "awful", "sad", "film", "plot", "cast", "the", "a", "was"]
PIXELS = 16
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def tokenizer(eos_is_pad: bool = False) -> Any:
    """Return a word-level tokenizer; with `eos_is_pad` as SmolLM2's, whose pad token is its eos token."""
    names = ["<pad>", "<unk>", "<eos>", *WORDS, *(f"w{i}" for i in range(20))]
    core = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad = "<eos>" if eos_is_pad else "<pad>"
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": pad}
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=40, **special)


def save(model: str, config: Any, folder: Path, words: Any = None) -> str:
    """Save a fresh model of class `model`, and its tokenizer, and return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(tf, model)(config).save_pretrained(folder)
    if words is not None:
        words.save_pretrained(folder)
    return str(folder)


def reviews(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return `n` texts whose words tell their label."""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        label = "pos" if i % 2 else "neg"
        mood = draw.sample(WORDS[:4] if label == "pos" else WORDS[4:8], 2)
        fill = [draw.choice(WORDS[8:] + [f"w{i}" for i in range(20)]) for _ in range(draw.randint(1, 4))]
        rows.append((" ".join([*mood, *fill]), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write prompts and completions."""
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


def write_pairs(folder: Path, n: int, seed: int = 0) -> Path:
    """Write `n` images with metadata.jsonl; each of four texts has its own shade."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for i in range(n):
        pixels = draw.integers(0, 40, (PIXELS, PIXELS, 3), dtype=np.uint8) + np.uint8(60 * (i % 4))
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {WORDS[i % 4]} film"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def trainer(
    adapter: Adapter, task: Task, folder: Path, output: Path, *, steps: int = 4, batch: int = 8, collate: Any = None,
    lr: float | None = None, quiet: bool = False, callbacks: Any = None, optimizers: Any = (None, None),
    compiles: bool = False, **args: Any,
) -> AdapterTrainer:  # fmt: skip
    """Return a trainer on the training rows in `folder`; `args` are transformers' own."""
    settings: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "steps", "logging_steps": 5, "seed": 0}
    made = TrainingArguments(
        str(output), max_steps=steps, per_device_train_batch_size=batch, report_to="none", disable_tqdm=quiet,
        remove_unused_columns=False, dataloader_pin_memory=False, **(settings | args),
    )  # fmt: skip
    return AdapterTrainer(
        adapter, made, lr=lr, stop=task.stop, quiet=quiet, train_dataset=task.items(load_data(folder).train),
        data_collator=collate or task.collate, callbacks=callbacks, optimizers=optimizers, compiles=compiles,
    )  # fmt: skip


class Break(TrainerCallback):
    """Ends a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
