"""Mixed batches beside Hugging Face PEFT: one batch whose rows use different adapters, over the bare base.

    python benchmarks/mixed.py [--rounds 15] [--layers 4] [--dtype float32] [--json out.json]

The base is of the SmolLM2-135M shape with random weights, LoRA of rank 8 is on every linear map. Time is process CPU
time of one forward pass without gradients; in a round every variant runs once, in rotated order; a figure is the median
over the rounds of its ratio to the bare base of that round, with quartiles. A decoded token follows 64 others in a
cache, which is cut back to them. The stacks are held, as in all passes of a `route` but the first: "first pass" is a
pass in a new `route`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from step import ALL, smol
from transformers import DynamicCache

import peftree

CASES = ((8, 128, 4), (8, 128, 8), (32, 1, 4), (32, 1, 8), (32, 1, 32))  # rows, tokens, adapters
GOALS = {(8, 128, 8): 1.10, (32, 1, 32): 1.40}
PAST = 64  # tokens in the cache before one is decoded


def ours(model: Any, adapters: int) -> Any:
    """Return a copy with peftree's adapters a0, a1, ..."""
    made = copy.deepcopy(model)
    for number in range(adapters):
        shake(peftree.adapt(made, "lora", sites="linear", r=8, name=f"a{number}").parameters(), number)
    return made.eval()


def theirs(model: Any, adapters: int) -> Any:
    """Return a copy with PEFT's adapters a0, a1, ..."""
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=ALL)
    made: Any = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="a0")
    for number in range(1, adapters):
        made.add_adapter(f"a{number}", config)
    for number in range(adapters):
        shake((p for n, p in made.named_parameters() if f".a{number}." in n), number)
    return made.eval()


def shake(parameters: Any, seed: int) -> None:
    """Move an adapter away from its start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter) * 0.02)


def step(model: Any, rows: int, tokens: int, **more: Any) -> Callable[[], Any]:
    """Return one pass: of a prompt, or of a token after `PAST` others."""
    ids = torch.randint(0, 49152, (rows, tokens), generator=torch.Generator().manual_seed(1))
    if tokens > 1:
        return lambda: model(input_ids=ids, use_cache=False, **more)
    cache = DynamicCache(config=getattr(model, "config", None))
    model(input_ids=ids.expand(-1, PAST), past_key_values=cache, use_cache=True, **more)

    def decode() -> Any:
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, **more)
        cache.crop(-1)
        return out

    return decode


def held(model: Any) -> int:
    """Return the bytes that the open route holds."""
    route = peftree.adapters(model)["a0"].graft.shared.now.route
    assert route is not None
    return sum(t.nbytes for m in route.mixed.values() for s in m.stacks.values() for t in s if t is not None)


def measure(case: tuple[int, int, int], layers: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return the ratios of one case to the bare base, and the base's milliseconds."""
    rows, tokens, adapters = case
    plain, names = smol(layers, False).to(dtype).eval(), [f"a{row % adapters}" for row in range(rows)]
    mine, other, solo = ours(plain, adapters), theirs(plain, adapters), ours(plain, 1)
    again = step(mine, rows, tokens)

    def first() -> None:
        with peftree.route(mine, names):
            again()

    run = {
        "bare base": step(plain, rows, tokens),
        "peftree, one adapter": step(solo, rows, tokens),
        "peftree, first pass": first,
        "HF PEFT, adapter_names": step(other, rows, tokens, adapter_names=names),
    }
    with peftree.route(mine, names):
        run["peftree, mixed"] = step(mine, rows, tokens)
        found: dict[str, list[float]] = {name: [] for name in run}
        times = 1 if tokens > 1 else 5
        for turn in range(-1, rounds):
            spent = {}
            for name in [*run][turn % len(run) :] + [*run][: turn % len(run)]:
                begin = time.process_time()
                for _ in range(times):
                    run[name]()
                spent[name] = (time.process_time() - begin) / times
            if turn >= 0:
                for name, seconds in spent.items():
                    found[name].append(seconds if name == "bare base" else seconds / spent["bare base"])
        out: dict[str, Any] = {"held, MB": held(mine) / 1e6}
    out["bare base, ms"] = statistics.median(found.pop("bare base")) * 1e3
    for name, ratios in found.items():
        low, middle, high = statistics.quantiles(ratios, n=4)
        out[name] = {"ratio": middle, "quartiles": [low, high]}
    return out


def main() -> None:
    """Print a line for each case, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    every = {}
    with torch.no_grad():
        for case in CASES:
            found = every["rows {}, tokens {}, adapters {}".format(*case)] = measure(
                case, args.layers, getattr(torch, args.dtype), args.rounds
            )
            goal = f"  goal {GOALS[case]:.2f}" if case in GOALS else ""
            told = (f"{n} {v['ratio']:.2f}" if isinstance(v, dict) else f"{n} {v:.1f}" for n, v in found.items())
            print("{} x {}, {} adapters: ".format(*case) + "; ".join(told) + goal, flush=True)
    if args.json:
        args.json.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
