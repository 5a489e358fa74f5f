"""torch's two back-ends for float32 products on a CPU, MKL and oneDNN, and what a whole LoRA step gains: decision 0044.

    python benchmarks/products.py [--rounds 15]

oneDNN is reached by torch's public switch. On a CPU with AMX the switch means bfloat16, which the errors then show.
GF/s of one thread, both in turns, medians; errors are the largest difference from float64, as a share of the largest
value.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
from step import Row, Step, compare, ours, ratios, section, smol, tokens, variants
from torch import Tensor
from torch.nn import functional

SHAPES = ((1024, 576, 1536), (1024, 2048, 2048), (128, 576, 8192), (32, 576, 576), (8, 576, 576), (1, 576, 1536))
BACK_ENDS = {"MKL": "none", "oneDNN": "bf16"}


def choose(back_end: str) -> None:
    """Set torch's switch."""
    torch.backends.mkldnn.matmul.fp32_precision = BACK_ENDS[back_end]


class Chosen(Step):
    """A training step by one back-end."""

    back_end = "MKL"

    def loss(self) -> Tensor:
        choose(self.back_end)  # the backward pass follows at once
        return super().loss()


def speeds(shape: tuple[int, int, int], asked: argparse.Namespace) -> Row:
    """Return GF/s of each kind of product of a shape, and the errors of the back-ends."""
    tokens, into, out = shape
    x, W, g = torch.randn(tokens, into), torch.randn(out, into), torch.randn(tokens, out)

    def by(name: str, product: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            choose(name)
            return product()

        return run

    run = {name: by(name, lambda: functional.linear(x, W)) for name in BACK_ENDS}
    run |= {f"back {name}": by(name, lambda: g @ W) for name in BACK_ENDS}
    xb, Wb = x.bfloat16(), W.bfloat16()
    run["bf16"] = by("MKL", lambda: functional.linear(xb, Wb))
    run["widened"] = by("MKL", lambda: functional.linear(xb.float(), Wb.float()))
    seconds = compare(run, asked.rounds, asked.seconds / len(SHAPES) / 2)
    row: Row = {"row": " x ".join(map(str, shape)), "rounds": len(seconds["MKL"])}
    row |= {n: round(2 * tokens * into * out / statistics.median(s) / 1e9) for n, s in seconds.items()}
    exact = x.double() @ W.double().t()
    for name in BACK_ENDS:
        far = float((run[name]() - exact).abs().max() / exact.abs().max())
        row[f"error {name}"] = f"{far:.1e}"
    choose("MKL")
    return row


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure the products, then a whole step."""
    torch.manual_seed(0)
    for shape in SHAPES:
        yield speeds(shape, asked)
    base, ((method, fields), _) = smol(4, False), variants("smol")["lora all"]
    steps = {name: Chosen(ours(base, method, fields), tokens(8, 128)) for name in BACK_ENDS}
    for name, each in steps.items():
        each.back_end = name
    found = ratios(compare(steps, asked.rounds, asked.seconds / 2), "MKL")
    yield {"row": "LoRA step, 4 layers, by oneDNN over MKL", "rounds": found["rounds"], "oneDNN": found["oneDNN"]}


if __name__ == "__main__":
    section(measured, __doc__)
