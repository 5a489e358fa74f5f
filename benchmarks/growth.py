"""How time grows with the length of the text, the layers and the adapters, for peftree and Hugging Face PEFT.

    python benchmarks/growth.py [--rounds 9] [--only "1 x 16 tokens"]

Lengths and layers: a training step with LoRA on all linear maps, over the step of the frozen model (`floor`), SmolLM2's
shape in float32; lengths with two layers, layers with 1 x 128 tokens. Adapters: a forward pass without gradients of 1 x
16 tokens and four layers, over the bare base, with so many adapters attached and one of them active.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import step
import torch
from mixed import ours, theirs
from step import LORA, Row, Step

import peftree

LENGTHS, LAYERS, ADAPTERS = (1, 16, 128, 1024, 4096), (1, 2, 4, 8, 16), (1, 4, 16, 64)


def trained(layers: int, length: int, asked: argparse.Namespace, share: float) -> Row:
    """Compare training steps over the frozen model's."""
    base, rows, config = step.smol(layers, False), step.tokens(1, length), step.variants("smol")["lora all"][1]
    steps = {
        "floor": Step(step.floor(base), rows),
        "peftree": Step(step.ours(base, "lora", LORA), rows),
        "peft": Step(step.theirs(base, config), rows),
    }
    return step.beside(steps, asked, share, over="floor")


def attached(count: int, asked: argparse.Namespace, share: float) -> Row:
    """Compare forward passes with many adapters attached, one of them active, over the bare base."""
    base, ids = step.smol(4, False).eval(), step.tokens(1, 16)
    mine, other = ours(base, count), theirs(base, count)
    peftree.switch(mine, "a0")
    models = {"bare": base, "peftree": mine, "peft": other}
    run = {name: lambda model=model: model(**ids) for name, model in models.items()}
    with torch.no_grad():
        return step.ratios(step.compare(run, asked.rounds, asked.seconds * share), "bare")


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure the three axes; the longest texts take most of the time."""
    every = {f"1 x {n} tokens": ("tokens", n) for n in LENGTHS}
    every |= {f"{n} layers" if n > 1 else "1 layer": ("layers", n) for n in LAYERS}
    every |= {f"{n} adapters" if n > 1 else "1 adapter": ("adapters", n) for n in ADAPTERS}
    for name, (axis, at) in every.items():
        if asked.only and name not in asked.only:
            continue
        share = 0.4 if at == max(LENGTHS) else 0.6 / len(every)
        if axis == "adapters":
            found = attached(at, asked, share)
        else:
            found = trained(*((at, 128) if axis == "layers" else (2, at)), asked, share)
        yield {"row": name, "axis": axis, "at": at, **found}


if __name__ == "__main__":
    step.section(measured, __doc__)
