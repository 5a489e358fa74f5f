"""Mixed batches beside Hugging Face PEFT: one batch whose rows use different adapters, over the bare base.

    python benchmarks/mixed.py [--rounds 15] [--layers 4] [--dtype float32] [--only "32 x 1, 32 adapters"]

The base is of the SmolLM2-135M shape with random weights, LoRA of rank 8 is on every linear map. Time is process CPU
time of one forward pass without gradients, over the bare base's in the same round (`benchmarks/step.py`). A decoded
token follows 64 others in a cache, which is cut back to them. The stacks are held, as in all passes of a `route` but
the first: "first pass" is a pass in a new `route`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from step import ALL, Row, compare, ratios, section, smol
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


def measure(case: tuple[int, int, int], asked: argparse.Namespace, share: float) -> Row:
    """Return the ratios of one case to the bare base, and the base's seconds."""
    rows, tokens, adapters = case
    plain = smol(asked.layers, False).to(getattr(torch, asked.dtype)).eval()
    names = [f"a{row % adapters}" for row in range(rows)]
    mine, other, solo = ours(plain, adapters), theirs(plain, adapters), ours(plain, 1)
    again = step(mine, rows, tokens)

    def first() -> None:
        with peftree.route(mine, names):
            again()

    run = {
        "bare": step(plain, rows, tokens),
        "one": step(solo, rows, tokens),
        "first": first,
        "peft": step(other, rows, tokens, adapter_names=names),
    }
    with peftree.route(mine, names):
        run["mixed"] = step(mine, rows, tokens)
        found = ratios(compare(run, asked.rounds, asked.seconds * share), "bare")
        return {**found, "goal": GOALS.get(case, ""), "held_bytes": held(mine)}


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure the cases that are asked for."""
    every = {"{} x {}, {} adapters".format(*case): case for case in CASES}
    wanted = {name: case for name, case in every.items() if not asked.only or name in asked.only}
    with torch.no_grad():
        for name, case in wanted.items():
            yield {"row": name, **measure(case, asked, 1 / len(wanted))}


if __name__ == "__main__":
    section(measured, __doc__, layers={"type": int, "default": 4}, dtype={"default": "float32"})
