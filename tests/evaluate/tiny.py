"""Tiny runs for the tests of probes: models of the zoo with rows, batches and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import peftree
import zoo
from peftree.adapter import Adapter
from peftree.evaluate.quality import Scores, classify, complete
from peftree.evaluate.subject import Subject

SIDE = zoo.PIXELS


class Line(NamedTuple):
    """A row."""

    source: str
    target: str


TASKS = {"bert_cls": "text-classification", "llama": "generation", "vit": "image-classification"}


def ids(text: str, length: int = 12) -> list[int]:
    """Return a token for every letter, none of them special."""
    return [8 + ord(character) % (zoo.VOCAB - 8) for character in text][:length] or [8]


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def text_batch(rows: Sequence[Line]) -> dict[str, Tensor]:
    tokens = [ids(r.source) for r in rows]
    mask = padded([[1] * len(t) for t in tokens], 0)
    return {
        "input_ids": padded(tokens, zoo.PAD),
        "attention_mask": mask,
        "labels": torch.tensor([int(r.target) for r in rows]),
    }


def prompt_batch(rows: Sequence[Line]) -> dict[str, Tensor]:
    pairs = [(ids(r.source), ids(r.target, 20)) for r in rows]
    tokens = [p + c for p, c in pairs]
    labels = padded([[-100] * len(p) + c for p, c in pairs], -100)
    mask = padded([[1] * len(t) for t in tokens], 0)
    return {"input_ids": padded(tokens, zoo.PAD), "attention_mask": mask, "labels": labels}


def image_batch(rows: Sequence[Line]) -> dict[str, Tensor]:
    pixels = []
    for row in rows:
        with Image.open(row.source) as file:
            pixels.append(np.asarray(file.convert("RGB").resize((SIDE, SIDE)), dtype=np.float32) / 127.5 - 1)
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return {"pixel_values": stacked, "labels": torch.tensor([int(r.target) for r in rows])}


BATCHES = {"text-classification": text_batch, "generation": prompt_batch, "image-classification": image_batch}


def lines(task: str, folder: Path, count: int = 10) -> list[Line]:
    """Return invented rows of three classes."""
    draw = np.random.default_rng(0)
    words = "good fine great bad poor awful film plot cast the was never".split()
    texts = [" ".join(draw.choice(words, 4)) for _ in range(count)]
    if task == "generation":
        return [Line(text, str(draw.choice(words))) for text in texts]
    if task == "text-classification":
        return [Line(text, str(i % 3)) for i, text in enumerate(texts)]
    rows = []
    for i in range(count):
        path = folder / f"{i}.png"
        mode = "L" if i == 1 else "RGB"  # one image has one channel
        pixels = draw.integers(0, 256, (20, 18 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
        rows.append(Line(str(path), str(i % 3)))
    return rows


def subject(
    base: str, method: str, folder: Path, *, moved: float = 0.0, general: Sequence[Any] = (), **fields: Any
) -> Subject:
    """Return a tiny run of a family of the zoo; `moved` adds noise of that size to the adapter's tensors."""
    model = zoo.build(base)
    adapter = peftree.adapt(model, method, **fields)
    if moved:
        move(adapter, moved)
    task = TASKS.get(base, "text-classification")
    return of(model, adapter, task, lines(task, folder), folder, general)


def of(
    model: nn.Module, adapter: Adapter, task: str, rows: Sequence[Line], folder: Path, general: Sequence[Any] = ()
) -> Subject:
    """Return a subject around a model."""

    def batches(rows: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(rows), 4):
            yield BATCHES[task](rows[start : start + 4])

    def score(rows: Sequence[Any]) -> Scores:
        return (complete if task == "generation" else classify)(model, batches(rows))

    return Subject(model, adapter, task, rows, score, batches, general, 0, folder)


def move(adapter: Adapter, size: float) -> None:
    """Add seeded normal noise to the floating-point parameters of an adapter."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype), alpha=size)


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Return every parameter and buffer of a model: which object it is, and a copy."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in named}
