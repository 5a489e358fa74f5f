"""Norms and gated networks that keep less, beside the plain ones and Hugging Face PEFT: one step of LoRA on all maps.

    python benchmarks/blocks.py [--rounds 7] [--shape smol whole] [--precision float32 bf16-base] [--deferred]
        [--only exact]

In every round each variant runs once, in rotated order; ratios to PEFT are taken within a round, and their median and
quartiles are reported. `exact`, `recompute` and `checkpoint` are the values of `activations`; `before` is `exact`
without the forms of norms and gated networks, `plain` without any fast form (PEFTREE_FAST=0), `again` a second copy of
PEFT's model. Bytes are exact, see `benchmarks/step.py`. With `--deferred`, peftree's whole models compute no logits
(decision 0040), as `peftree train` does.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import fast
import step
import torch
from torch import Tensor, nn

from peftree.adapter import adapters, graft_of
from peftree.deltas.fused import fast_forms
from peftree.evaluate.cost import saved_bytes
from peftree.loss import deferred

OURS = ("exact", "recompute", "checkpoint", "before", "plain")


class Timed(step.Step):
    """A training step of one variant."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], name: str, waits: bool) -> None:
        super().__init__(model, batch)
        self.name, self.waits = name, waits and name in OURS

    def loss(self) -> Tensor:
        """Return the loss."""
        wait: Any = deferred(self.model) if self.waits else contextlib.nullcontext()
        with fast_forms(self.name != "plain"), wait:
            return super().loss()

    def __call__(self) -> None:
        """Run the step; recomputed layers take the same forms as at first."""
        with fast_forms(self.name != "plain"):
            super().__call__()


def ours(base: nn.Module, name: str) -> nn.Module:
    """Return a copy of `base` with LoRA on all maps, as the variant has it."""
    model = step.ours(base, "lora", {"r": 8, "sites": "linear"})
    if name in ("recompute", "checkpoint"):
        adapters(model)["default"].activations = name
    if name == "before":
        for *_, hub in graft_of(model).hubs():
            hub.form = None
    return model


def measured(kind: str, base: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace) -> list[str]:
    """Measure one shape and precision and return its rows."""
    config = step.variants(kind)["lora all"][1]
    steps = {n: Timed(ours(base, n), batch, n, args.deferred) for n in OURS if n in (args.only or OURS)}
    theirs = ("peft", "again") if args.rounds else ("peft",)
    steps |= {n: Timed(step.theirs(base, config), batch, n, False) for n in theirs}
    seconds = step.compare(steps, args.rounds) if args.rounds else {}
    saved = {n: saved_bytes(s.loss, s.model) for n, s in steps.items()}
    peak = {n: step.peak_bytes(s) for n, s in steps.items()}
    rows = []
    for name in steps:
        cells = ["-"]
        if seconds:
            median, (low, high) = step.spread(seconds[name], seconds["peft"])
            cells = [f"{median:.3f} ({low:.3f}-{high:.3f})"]
        for found in (saved, peak):
            cells += [f"{found[name] / 1e6:,.1f}", f"{found[name] / found['peft']:.3f}"]
        rows.append(f"{name} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="0: bytes alone")
    parser.add_argument("--only", nargs="*", default=[], choices=OURS)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shape", nargs="*", default=["smol"], choices=("smol", "whole"))
    parser.add_argument("--precision", nargs="*", default=["float32"], choices=("float32", "bf16-base"))
    parser.add_argument("--deferred", action="store_true")
    args = parser.parse_args()
    args.whole = "whole" in args.shape
    torch.set_num_threads(1)
    print("Ratios to PEFT: CPU time with quartiles; MB saved for the backward pass, MB at the allocator's peak.\n")
    print("| shape | precision | variant | time | saved | ratio | peak | ratio |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for kind, base, batch in step.bases(args):
        for precision in args.precision:
            for row in (
                measured(kind, base.to(fast.PRECISIONS[precision][0]), batch, args) if kind in args.shape else ()
            ):
                print(f"| {kind} | {precision} | {row}", flush=True)


if __name__ == "__main__":
    main()
