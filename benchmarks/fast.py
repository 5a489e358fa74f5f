"""Fast forms beside the plain ones and beside Hugging Face PEFT: time and bytes of a training step, one thread.

    python benchmarks/fast.py [--rounds 15] [--only "lora all"] [--shape smol] [--precision float32 autocast-bf16]

In every round each variant runs once, in rotated order; ratios are taken within a round, and their median and quartiles
are reported. `fast` is peftree as it is, `plain` is peftree with its fast forms off, `again` a second copy of PEFT's
model, which shows what the machine's noise alone does. Bytes are exact, see `benchmarks/step.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from collections.abc import Callable
from typing import Any

import step
import torch
from torch import Tensor, nn

import peftree
from peftree.deltas.fused import fast_forms
from peftree.evaluate.cost import saved_bytes

PRECISIONS = {
    "float32": (torch.float32, None),
    "autocast-bf16": (torch.float32, torch.bfloat16),
    "autocast-fp16": (torch.float32, torch.float16),
    "bf16-base": (torch.bfloat16, None),
    "bf16-base-autocast": (torch.bfloat16, torch.bfloat16),
}


class Timed(step.Step):
    """A training step with or without fast forms, under autocast or not."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], on: bool, low: torch.dtype | None) -> None:
        super().__init__(model, batch)
        self.on, self.low = on, low

    def loss(self) -> Tensor:
        """Return the loss."""
        cast = torch.autocast("cpu", self.low) if self.low else contextlib.nullcontext()
        with fast_forms(self.on), cast:
            return super().loss()


def cases(kind: str) -> dict[str, tuple[Callable[[nn.Module], None], Callable[[], Any]]]:
    """Return name -> what adapts a model by peftree, and PEFT's config."""
    import peft

    every = step.BERT_ALL if kind == "bert" else step.ALL

    def lora(**more: Any) -> Callable[[], Any]:
        return lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=every, **more)

    def ours(method: str, **fields: Any) -> Callable[[nn.Module], None]:
        return lambda model: (peftree.adapt(model, method, **fields), None)[1]

    known = step.variants(kind)
    out = {n: (ours(m, **f), config) for n, ((m, f), config) in known.items() if n in ("lora all", "dora all", "ia3")}
    out["lora all, dropout .05"] = ours("lora", sites="linear", dropout=0.05), lora(lora_dropout=0.05)
    out["lora all, dropout .1"] = ours("lora", sites="linear", dropout=0.1), lora(lora_dropout=0.1)
    out["two loras"] = _two, lora()
    return out


def _two(model: nn.Module) -> None:
    for name in ("a", "b"):
        peftree.adapt(model, "lora", sites="linear", name=name)


def theirs(base: nn.Module, name: str, config: Callable[[], Any]) -> nn.Module:
    """Return a copy of `base` under Hugging Face PEFT."""
    model: Any = step.theirs(base, config)
    if name == "two loras":
        model.add_adapter("other", config())
        model.base_model.set_adapter(["default", "other"])
    return model  # type: ignore[no-any-return]


def measured(kind: str, base: nn.Module, batch: dict[str, Tensor], name: str, precision: str, rounds: int) -> str:
    """Measure one case and return its row."""
    dtype, low = PRECISIONS[precision]
    base = base.to(dtype)
    put, config = cases(kind)[name]
    models = []
    for _ in range(2):
        models.append(step.copy.deepcopy(base))
        put(models[-1])
    steps = {
        "fast": Timed(models[0], batch, True, low),
        "plain": Timed(models[1], batch, False, low),
        "peft": Timed(theirs(base, name, config), batch, True, low),
        "again": Timed(theirs(base, name, config), batch, True, low),
    }
    seconds = step.compare(steps, rounds)
    ratios = {n: step.spread(seconds[n], seconds["peft"]) for n in ("fast", "plain", "again")}
    steps.pop("again")
    saved = {n: saved_bytes(s.loss, s.model) for n, s in steps.items()}
    peak = {n: step.peak_bytes(s) for n, s in steps.items()}
    cells = [f"{median:.3f} ({low:.3f}-{high:.3f})" for median, (low, high) in ratios.values()]
    cells += [f"{found[n] / found['peft']:.3f}" for found in (saved, peak) for n in ("fast", "plain")]
    return f"| {kind} | {precision} | {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--shape", nargs="*", default=["smol", "bert"])
    parser.add_argument("--precision", nargs="*", default=["float32", "autocast-bf16"], choices=PRECISIONS)
    args = parser.parse_args()
    args.whole = False
    torch.set_num_threads(1)
    print("Ratios to PEFT: time with quartiles, bytes saved for the backward pass, peak of the allocator.\n")
    print("| shape | precision | method | fast | plain | noise | saved, fast | plain | peak, fast | plain |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for kind, base, batch in step.bases(args):
        for precision in args.precision:
            for name in cases(kind):
                if kind in args.shape and (not args.only or name in args.only):
                    print(measured(kind, base, batch, name, precision, args.rounds), flush=True)
                    gc.collect()


if __name__ == "__main__":
    main()
