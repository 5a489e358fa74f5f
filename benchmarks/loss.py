"""A training step of SmolLM2-135M without whole logits, beside one with them and Hugging Face PEFT's.

    python benchmarks/loss.py [--rounds 5]

LoRA on all linear maps, 8 x 128 tokens, float32, AdamW; with a label for each token, and for the second half of each
row, as where a prompt comes first. Time, saved bytes and peak are those of `benchmarks/step.py`. A second table is of
scoring such batches with the base.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from step import Step, compare, ours, peak_bytes, smol, spread, theirs, variants
from torch import Tensor, nn

from peftree.evaluate.cost import allocator_peak, saved_bytes
from peftree.evaluate.quality import completed, evaluating
from peftree.loss import deferred


class Chunked(Step):
    """A step whose loss is computed some tokens at a time, as in `peftree train`."""

    def loss(self) -> Tensor:
        with deferred(self.model):
            return super().loss()


def scored(model: nn.Module, batch: dict[str, Tensor], rounds: int) -> tuple[float, list[int]]:
    """Return the CPU time of scoring a batch in chunks over that with whole logits, and the peak of both in bytes."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with evaluating(model):
        for turn in range(rounds + 1):
            for on in seconds:
                begin = time.process_time()
                completed(model, batch, on)
                seconds[on] += [time.process_time() - begin] if turn else []
        peaks = [allocator_peak(lambda on=on: completed(model, batch, on)) for on in seconds]  # type: ignore[misc]
    return statistics.median(a / b for a, b in zip(seconds[True], seconds[False], strict=True)), peaks


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    base = smol(30, True)
    ids = torch.randint(5, 20000, (8, 128), generator=torch.Generator().manual_seed(1))
    half = ids.clone()
    half[:, :64] = -100
    (method, fields), config = variants("whole")["lora all"]
    print("| labels | loss | CPU time / PEFT | quartiles | saved / PEFT | allocator peak, MiB | peak / PEFT |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for labels, target in (("all tokens", ids), ("half", half)):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target}
        made = {
            "chunked": Chunked(ours(base, method, fields), batch),
            "whole logits": Step(ours(base, method, fields), batch),
        }
        made |= {"PEFT": Step(theirs(base, config), batch)}
        peak = {name: peak_bytes(step) for name, step in made.items()}
        saved = {name: saved_bytes(step.loss, step.model) for name, step in made.items()}
        seconds = compare(made, rounds)
        for name in made:
            time, (low, high) = spread(seconds[name], seconds["PEFT"])
            figures = f"{time:.2f} | {low:.2f}-{high:.2f} | {saved[name] / saved['PEFT']:.2f}"
            print(
                f"| {labels} | {name} | {figures} | {peak[name] >> 20} | {peak[name] / peak['PEFT']:.2f} |", flush=True
            )
    print("\n| scored | CPU time, chunks / whole | peak in chunks, MiB | whole, MiB |\n|---|--:|--:|--:|")
    base.requires_grad_(False)
    for labels, target in (("all tokens", ids), ("half", half)):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": target}
        share, (chunks, whole) = scored(base, batch, rounds)
        print(f"| {labels} | {share:.2f} | {chunks >> 20} | {whole >> 20} |", flush=True)


if __name__ == "__main__":
    main()
