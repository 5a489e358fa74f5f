"""Tiny random models and data of the demo's three tasks, made in a folder without network."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zoo

WORDS = [f"w{i}" for i in range(zoo.VOCAB - 8)]
CLASSES = ("left", "right", "middle")


def model(folder: Path, family: str, *, text: bool) -> Path:
    """Save a tiny model of the zoo, with a tokenizer for `text`."""
    made = zoo.build(family)
    made.save_pretrained(folder)  # type: ignore[operator]
    if text:
        special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[A]", "[B]", "[C]", "[D]"]
        vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
        raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")
        fast.save_pretrained(folder)
    return folder


def data(folder: Path, task: str, sizes: dict[str, int]) -> Path:
    """Write data in which the answer can be learned."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        rows = [rng.sample(range(len(WORDS)), 5) for _ in range(size)]
        if task == "text-classification":
            with (folder / f"{split}.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["text", "label"])
                for number, row in enumerate(rows):
                    label = CLASSES[number % 3]
                    writer.writerow([" ".join([f"w{number % 3}", *(WORDS[i] for i in row)]), label])
        elif task == "generation":
            pairs = [{"prompt": WORDS[a], "completion": f"{WORDS[b]} {WORDS[a]}"} for a, b, *_ in rows]
            lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
            (folder / f"{split}.jsonl").write_text(lines)
        else:
            for number, row in enumerate(rows):
                pixels = np.zeros((20, 20), np.uint8) + np.uint8(row[0])
                pixels[:, 6 * (number % 3) : 6 * (number % 3) + 6] = 250
                path = folder / split / CLASSES[number % 3] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder
