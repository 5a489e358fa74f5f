"""Step time and peak memory on a GPU beside Hugging Face PEFT: a 1B and a 7B shape with random weights, in bf16.

    python benchmarks/gpu.py [--shapes 1b 7b] [--rounds 7] [--device cuda] [--json results/bench-gpu.json]

A step is a forward pass under autocast of a bfloat16 base, a backward pass and fused AdamW over float32 adapters. Each
variant is built, warmed up, timed and dropped before the next, since two 7B models need not fit; in every round all
variants run in rotated order. Time is of the device: work is awaited before and after each step. Peak is the
allocator's, weights included. `--device cpu --shapes tiny` runs the same code on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftree
from peftree.evaluate.cost import held_peak, tensor_bytes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "vocab_size": 32000},
}  # fmt: skip
BATCHES = {"tiny": (2, 16), "1b": (8, 512), "7b": (4, 512)}  # rows, tokens
WARM_UP = 3


def base(shape: str, device: torch.device) -> Any:
    """Return a decoder of a shape with random bfloat16 weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[shape], use_cache=False), dtype=torch.bfloat16)


def ours(method: str, fields: dict[str, Any], model: Any) -> nn.Module:
    """Return the model with a peftree adapter."""
    peftree.adapt(model, method, **fields)
    return model


def theirs(settings: dict[str, Any], model: Any) -> nn.Module:
    """Return the model with PEFT's adapter."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules=ALL, task_type="CAUSAL_LM", **settings))


def variants() -> dict[str, Callable[[Any], nn.Module]]:
    """Return by name what puts an adapter on a model."""
    lora = {"r": 16, "alpha": 32.0, "sites": "linear"}
    return {
        "peftree lora": partial(ours, "lora", lora),
        "PEFT lora": partial(theirs, {"r": 16, "lora_alpha": 32}),
        "peftree dora": partial(ours, "dora", lora),
        "PEFT dora": partial(theirs, {"r": 16, "lora_alpha": 32, "use_dora": True}),
    }


def wait(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(put: Callable[[Any], nn.Module], shape: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the seconds of each step of a variant, the peak of a step, and the trained parameters."""
    model: Any = put(base(shape, device)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], BATCHES[shape], device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = []
    for number in range(WARM_UP + rounds):
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        times += [time.perf_counter() - start] if number >= WARM_UP else []
    state = [v for held in optimizer.state.values() for v in held.values()]
    still = tensor_bytes([*model.parameters(), *model.buffers(), *state])
    return {"seconds": times, "peak": still + held_peak(step, device), "trained": sum(p.numel() for p in trained)}


def compared(shape: str, device: torch.device, rounds: int, passes: int = 2) -> dict[str, Any]:
    """Return what each variant takes for a shape; variants run one after another, in turned order in each pass."""
    found: dict[str, Any] = {}
    names = list(variants())
    for turn in range(passes):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            one = measured(variants()[name], shape, device, rounds)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            known = found.setdefault(name, one)
            known["seconds"] += one["seconds"] if known is not one else []
    return {
        name: {"seconds": statistics.median(one["seconds"]), "peak": one["peak"], "trained": one["trained"]}
        for name, one in found.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "7b"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here. --device cpu --shapes tiny runs the same code on a CPU.")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = {"device": where, "torch": torch.__version__, "shapes": {}}
    for shape in args.shapes:
        result["shapes"][shape] = found = compared(shape, device, args.rounds)  # type: ignore[index]
        print(f"{shape}, {BATCHES[shape][0]} x {BATCHES[shape][1]} tokens, {where}")
        for name, one in found.items():
            print(f"  {name:14} {one['seconds'] * 1e3:9.1f} ms {one['peak'] / 2**30:7.2f} GiB {one['trained']:>12,}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
