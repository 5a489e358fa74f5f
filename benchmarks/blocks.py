"""Norms and gated networks that keep less, beside the plain ones and Hugging Face PEFT: one step of LoRA on all maps.

    python benchmarks/blocks.py [--rounds 7] [--only "two layers" whole]

`exact`, `recompute` and `checkpoint` are the values of `activations`; `before` is `exact` without the forms of norms
and gated networks (decision 0045), `plain` without any fast form (PEFTREE_FAST=0). The whole of SmolLM2-135M, with its
head, is measured in bytes alone; there peftree computes no logits (decision 0040), as `peftree train` does.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import step
from step import LORA, Row, Step
from torch import nn

from peftree.adapter import adapters, graft_of
from peftree.deltas.fused import fast_forms
from peftree.evaluate.cost import allocator_peak, saved_bytes
from peftree.loss import deferred

OURS = ("exact", "recompute", "checkpoint", "before", "plain")


def ours(base: nn.Module, name: str) -> nn.Module:
    """Return a copy of `base` with LoRA on all maps, as the variant has it."""
    model = step.ours(base, "lora", LORA)
    (adapter,) = adapters(model).values()
    if name in ("recompute", "checkpoint"):
        adapter.activations = name
    if name == "before":
        for *_, hub in graft_of(model).hubs():
            hub.form = None
    return model


def made(name: str, base: nn.Module, whole: bool) -> Step:
    """Return a variant's step."""
    rows = step.tokens(8, 128, labels=whole)
    if name not in OURS:
        return Step(step.theirs(base, step.variants("whole" if whole else "smol")["lora all"][1]), rows)

    @contextlib.contextmanager
    def around(model: nn.Module) -> Iterator[None]:
        plain = fast_forms(False) if name == "plain" else contextlib.nullcontext()
        with plain, deferred(model) if whole else contextlib.nullcontext():
            yield

    return Step(ours(base, name), rows, around)


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure two layers, and the bytes of the whole model."""
    for shape, names in (("two layers", (*OURS, "peft", "again")), ("whole", (*OURS[:2], "before", "peft"))):
        if asked.only and shape not in asked.only:
            continue
        whole = shape == "whole"
        base = step.smol(30 if whole else 2, whole)
        if whole:
            steps = ((name, made(name, base, True)) for name in names)  # one at a time: each has its copy of the base
            times: Row = {"rounds": 1}
        else:
            held = {name: made(name, base, False) for name in names}
            times = step.ratios(step.compare(held, asked.rounds, asked.seconds), "peft")
            steps = iter(held.items())
        found = {name: (saved_bytes(one.loss, one.model), allocator_peak(one)) for name, one in steps}
        for name in names:
            row: Row = {"row": f"{shape}, {name}", "rounds": times["rounds"]}
            row |= {"peftree": times[name]} if name in times else {}
            for side, of in (("peftree", name), ("peft", "peft")):
                row |= {f"{side} saved_bytes": found[of][0], f"{side} peak_bytes": found[of][1]}
            if name != "peft":
                yield row


if __name__ == "__main__":
    step.section(measured, __doc__)
