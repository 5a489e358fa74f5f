"""torch's two back-ends for float32 products on a CPU, MKL and oneDNN, and what a whole LoRA step gains: decision 0044.

    python benchmarks/products.py [--rounds 15]

oneDNN is reached by torch's public switch. On a CPU with AMX the switch means bfloat16, which the errors then show.
GF/s of one thread, both in turns, medians; errors are the largest difference from float64, as a share of the largest
value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from step import Step, compare, ours, smol, spread, variants
from torch import Tensor
from torch.nn import functional

SHAPES = ((1024, 576, 1536), (1024, 2048, 2048), (128, 576, 8192), (32, 576, 576), (8, 576, 576), (1, 576, 1536))
BACK_ENDS = {"MKL": "none", "oneDNN": "bf16"}


def choose(back_end: str) -> None:
    """Set torch's switch."""
    torch.backends.mkldnn.matmul.fp32_precision = BACK_ENDS[back_end]


def timed(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each, run in turns; a name that is a back-end chooses it."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            choose(name if name in BACK_ENDS else "MKL")
            begin = time.process_time()
            run()
            seconds[name] += [time.process_time() - begin] if turn else []
    choose("MKL")
    return {name: statistics.median(found) for name, found in seconds.items()}


class Chosen(Step):
    """A training step by one back-end."""

    back_end = "MKL"

    def loss(self) -> Tensor:
        choose(self.back_end)  # the backward pass follows at once
        return super().loss()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        "| tokens x in x out | MKL | oneDNN | back: MKL | oneDNN | bf16 | bf16 widened | fp16 | error: MKL | oneDNN |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for tokens, into, out in SHAPES:
        x, W, g = torch.randn(tokens, into), torch.randn(out, into), torch.randn(tokens, out)
        (xb, Wb), (xh, Wh) = (x.bfloat16(), W.bfloat16()), (x.half(), W.half())
        seconds = [
            timed(dict.fromkeys(BACK_ENDS, lambda x=x, W=W: functional.linear(x, W)), rounds),
            timed(dict.fromkeys(BACK_ENDS, lambda g=g, W=W: g @ W), rounds),
            timed({"bf16": lambda x=xb, W=Wb: functional.linear(x, W)}, rounds),
            timed({"widened": lambda x=xb, W=Wb: functional.linear(x.float(), W.float())}, rounds),
            timed({"fp16": lambda x=xh, W=Wh: functional.linear(x, W)}, 5),
        ]
        exact, errors = x.double() @ W.double().t(), []
        for name in BACK_ENDS:
            choose(name)
            errors.append(float((functional.linear(x, W) - exact).abs().max() / exact.abs().max()))
        choose("MKL")
        speeds = [f"{2 * tokens * into * out / s / 1e9:.0f}" for found in seconds for s in found.values()]
        print(f"| {tokens} x {into} x {out} | {' | '.join(speeds)} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)
    base, ((method, fields), _) = smol(4, False), variants("smol")["lora all"]
    batch = {"input_ids": torch.randint(5, 20000, (8, 128), generator=torch.Generator().manual_seed(1))}
    steps = {name: Chosen(ours(base, method, fields), batch) for name in BACK_ENDS}
    for name, each in steps.items():
        each.back_end = name
    found = compare(steps, rounds)
    median, (low, high) = spread(found["oneDNN"], found["MKL"])
    share = f"{median:.2f} ({low:.2f}-{high:.2f})"
    print(f"\nA LoRA step (4 layers, 8 x 128 tokens) by oneDNN takes {share} of its time by MKL.")


if __name__ == "__main__":
    main()
