"""Steps of all of SmolLM2-135M beside Hugging Face PEFT, with its head of 49,152 words, with and without logits.

    python benchmarks/whole.py [whole | loss | rss] [--rounds 5]

4 x 128 tokens, float32, AdamW. `chunked` is peftree's loss without whole logits, as in `peftree train`; `peftree`
computes them, as PEFT does. In `loss` the second half of each row has labels, as where a prompt comes first, and such
batches are scored with the base. In `rss` each variant is a process of its own that takes two steps; the figure is the
growth of its resident memory above what it had when the model was adapted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import step
import torch
from step import Row, Step
from torch import Tensor, nn

from peftree.evaluate.cost import allocator_peak, current_rss, peak_rss, reset_peaks
from peftree.evaluate.quality import completed, evaluating
from peftree.loss import deferred

PROCESSES = ("floor", "peft", "peftree", "chunked", "peft, checkpoints", "chunked, checkpoints")


def batch(half: bool) -> dict[str, Tensor]:
    """Return a batch with a label for each token, or for the second half of each row."""
    found = step.tokens(4, 128, labels=True)
    if half:
        found["labels"] = found["labels"].clone()
        found["labels"][:, : found["labels"].shape[1] // 2] = -100
    return found


def made(name: str, base: nn.Module, method: str, rows: dict[str, Tensor]) -> Step:
    """Return a variant's step."""
    (kind, fields), config = step.variants("whole")[method]
    name, _, checkpoints = name.partition(", ")
    build: dict[str, Callable[[], nn.Module]] = {
        "floor": lambda: step.floor(base),
        "peft": lambda: step.theirs(base, config),
    }
    model: Any = build.get("peft" if name == "again" else name, lambda: step.ours(base, kind, fields))()
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Step(model, rows, deferred if name == "chunked" else None)


def steps(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure LoRA and DoRA on all linear maps."""
    base, wanted = step.smol(30, True), asked.only or ["lora all", "dora all"]
    for method in wanted:
        names = ("chunked", "peftree", "peft", "again", "floor")
        found = {name: made(name, base, method, batch(False)) for name in names}
        yield {"row": method, **step.beside(found, asked, 1 / len(wanted))}


def labelled(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure a step whose prompts have no labels, and scoring."""
    base = step.smol(30, True)
    names = ("chunked", "peftree", "peft")
    if not asked.only or "step, half of the tokens" in asked.only:
        found = {name: made(name, base, "lora all", batch(True)) for name in names}
        yield {"row": "step, half of the tokens", **step.beside(found, asked, 0.5)}
        del found
    base.requires_grad_(False)
    for words, half in (("all tokens", False), ("half of the tokens", True)):
        if asked.only and f"scoring, {words}" not in asked.only:
            continue
        rows = batch(half)
        run = {
            "chunked": lambda rows=rows: completed(base, rows, True),
            "whole": lambda rows=rows: completed(base, rows, False),
        }
        with evaluating(base):
            seconds = step.ratios(step.compare(run, asked.rounds, asked.seconds / 4), "whole")
            peaks = {f"{name} peak_bytes": allocator_peak(function) for name, function in run.items()}
        # The base with whole logits stands where PEFT stands in a step.
        yield {"row": f"scoring, {words}", **seconds, "chunked peak_bytes": peaks["chunked peak_bytes"],
               "peft peak_bytes": peaks["whole peak_bytes"]}  # fmt: skip


def processes(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure the resident memory of fresh processes, the least of the rounds."""
    names = asked.only or (PROCESSES[1:4:2] if step.SMALL else PROCESSES)
    found: dict[str, list[dict[str, int]]] = {name: [] for name in names}
    for _ in range(asked.rounds):
        for name in found:
            run = [sys.executable, "-W", "ignore", __file__, "process", "--only", name]
            done = subprocess.run(run, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    least = {name: min(r["grown_bytes"] for r in runs) for name, runs in found.items()}
    for name, runs in found.items():
        over = round(least[name] / least["peft"], 4) if "peft" in least else None
        yield {"row": name, "rounds": asked.rounds, "base_bytes": runs[0]["base_bytes"], "grown_bytes": least[name],
               "share": over}  # fmt: skip


def process(name: str) -> None:
    """Take two steps in this process and print what its memory was."""
    run = made(name, step.smol(30, True), "lora all", batch(False))
    reset_peaks(torch.device("cpu"))
    before = current_rss() or 0
    for _ in range(2):
        run()
    print(json.dumps({"base_bytes": before, "grown_bytes": peak_rss() - before}))


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure the part that is asked for."""
    if asked.part == "process":
        process(asked.only[0])
        return iter(())
    return {"loss": labelled, "rss": processes}.get(asked.part, steps)(asked)


if __name__ == "__main__":
    step.section(measured, __doc__)
