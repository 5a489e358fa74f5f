"""CPU seconds of what one does with adapters, beside Hugging Face PEFT.

    python benchmarks/operations.py [peftree | peft] [--rounds 2]

Each library runs in processes of its own, in turns; a figure is the median of the rounds. With the name of a library it
is one such process, which prints a line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MANY = 64  # adapters on one model
ALL = "command: plan, every method, 7B"  # at one batch and length; minutes, so in the first round alone
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Operation -> goal, and what it is compared with: "s" seconds, "x" the other library's time, or another operation.
GOALS: dict[str, tuple[float, str]] = {
    "import beyond torch and transformers": (0.05, "s"),
    "first adapter in a process, with imports": (0.3, "s"),
    f"attach one more to {MANY - 1}": (2.0, "attach one more to 1"),
    "attach the 256th": (2.0, "attach one more to 1"),
    f"switch, {MANY} attached": (1.0, "x"),
    f"switch all off and on, {MANY} attached": (1.0, "x"),
    f"detach one of {MANY}": (0.03, "s"),
    f"detach the other {MANY - 1}": (0.3, "s"),
    "save, first in a process": (1.0, "x"),
    "save again": (1.0, "x"),
    "load another": (1.0, "x"),
    "merge": (1.0, "x"),
    "unmerge": (1.0, "x"),
    "replace by a loaded adapter": (0.1, "x"),
    "replace by a folder": (0.1, "x"),
    "command: methods": (0.5, "s"),
    "command: plan, one method, 70B": (5.0, "s"),
    ALL: (30.0, "s"),
}
WHY = {
    "first adapter in a process, with imports": "imports of pydantic and peftree's modules are most of it, 210 places "
    "the rest: adding a second adapter takes what `attach one more to 1` says",
    "command: plan, one method, 70B": "half of it are imports of torch and transformers",
    ALL: "every method is traced by itself, at two depths, for training and for scoring: about 2,700 operations of "
    "torch's fake tensors; where layers share a tensor whose size depends on their number, all layers are traced",
    "save, first in a process": "every weight of the base is read once for its fingerprint, and rounded twice",
    "save again": "fsync of three files and two folders, SHA-256 of the weights, and a record of the base beside them",
    "load another": "every weight of the base is read for the check that the adapter was made for it",
    "replace by a loaded adapter": "at the goal, within noise",
    "replace by a folder": "the folder is checked as for loading, the base too; load it once, then replace by that",
    "merge": "the merged weights are new tensors, so that `unmerge` puts back the old ones to the bit; four fifths of "
    "the time are first touches of that memory (the same products in place take a seventh)",
    "command: methods": "typer, rich, pydantic and the facts of 130 methods; no torch",
}
PLAN = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
SEVEN = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


def timed(function: Callable[[], object], times: int = 1) -> float:
    """Return the CPU seconds of one call, the median of `times`."""
    found = []
    for _ in range(times):
        gc.collect()  # not in the middle of one of the libraries' calls
        begin = time.process_time()
        function()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def smol() -> Any:
    """Return the SmolLM2-135M shape: 30 layers, 210 linear maps, a small vocabulary."""
    from transformers import LlamaConfig, LlamaModel

    layers = 1 if os.environ.get("BENCH_SMALL") else 30
    return LlamaModel(LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=1000,
    ))  # fmt: skip


def ours() -> dict[str, float]:
    """Measure peftree."""
    model = smol()
    out = {}
    start = time.process_time()
    import peftree

    out["import beyond torch and transformers"] = time.process_time() - start

    def put(name: str, r: int = 8) -> Any:
        return peftree.adapt(model, "lora", sites="linear", name=name, r=r)

    out["first adapter in a process, with imports"] = timed(lambda: put("a"))
    out["attach one more to 1"] = timed(lambda: put("b"))
    a, b = (peftree.adapters(model)[name] for name in "ab")
    with tempfile.TemporaryDirectory() as folder:
        out["save, first in a process"] = timed(lambda: peftree.save(a, f"{folder}/a"))
        out["save again"] = timed(lambda: peftree.save(a, f"{folder}/a"), 3)
        out["load another"] = timed(lambda: peftree.load(model, f"{folder}/a", name="c"))
        out["load another, low_cpu_mem_usage"] = out["load another"]
        out["replace by a loaded adapter"] = timed(lambda: peftree.replace(a, b), 3)
        out["replace by a folder"] = timed(lambda: peftree.replace(a, f"{folder}/a"), 3)
    peftree.switch(model, "a")
    pairs = [(timed(lambda: peftree.merge(model)), timed(lambda: peftree.unmerge(model))) for _ in range(5)]
    out["merge"], out["unmerge"] = (statistics.median(column) for column in zip(*pairs, strict=True))
    peftree.detach(model)
    for number in range(MANY - 1):
        put(f"m{number}", 2)
    out[f"attach one more to {MANY - 1}"] = timed(lambda: put("last", 2))
    out[f"switch, {MANY} attached"] = timed(lambda: peftree.switch(model, "m3"), 3)

    def off() -> None:
        with peftree.disabled(model):
            pass

    out[f"switch all off and on, {MANY} attached"] = timed(off, 3)
    out[f"detach one of {MANY}"] = timed(lambda: peftree.detach(model, "m5"))
    out[f"detach the other {MANY - 1}"] = timed(lambda: peftree.detach(model))
    for number in range(255):
        put(f"m{number}", 2)
    out["attach the 256th"] = timed(lambda: put("last", 2))
    return out


def theirs() -> dict[str, float]:
    """Measure Hugging Face PEFT."""
    model = smol()
    out = {}
    start = time.process_time()
    import peft
    from peft.utils.hotswap import hotswap_adapter

    out["import beyond torch and transformers"] = time.process_time() - start
    lora, held = peft.LoraConfig(r=8, target_modules=EVERY), list[Any]()
    first = timed(lambda: held.append(peft.get_peft_model(model, lora, adapter_name="a")))
    out["first adapter in a process, with imports"] = first + out["import beyond torch and transformers"]
    wrapped = held[0]
    out["attach one more to 1"] = timed(lambda: wrapped.add_adapter("b", lora))
    with tempfile.TemporaryDirectory() as folder:
        out["save, first in a process"] = timed(lambda: wrapped.save_pretrained(folder, selected_adapters=["a"]))
        out["save again"] = timed(lambda: wrapped.save_pretrained(folder, selected_adapters=["a"]), 3)
        out["load another"] = timed(lambda: wrapped.load_adapter(f"{folder}/a", "c"))
        lean = timed(lambda: wrapped.load_adapter(f"{folder}/a", "d", low_cpu_mem_usage=True))
        out["load another, low_cpu_mem_usage"] = lean
        wrapped.delete_adapter("d")
        swap = timed(lambda: hotswap_adapter(wrapped, f"{folder}/a", "a", torch_device="cpu"), 3)
        out["replace by a loaded adapter"] = out["replace by a folder"] = swap
    wrapped.set_adapter("a")
    pairs = [(timed(wrapped.merge_adapter), timed(wrapped.unmerge_adapter)) for _ in range(5)]
    out["merge"], out["unmerge"] = (statistics.median(column) for column in zip(*pairs, strict=True))
    wrapped.delete_adapter("c")
    small = peft.LoraConfig(r=2, target_modules=EVERY)
    for number in range(MANY - 3):
        wrapped.add_adapter(f"m{number}", small)
    out[f"attach one more to {MANY - 1}"] = timed(lambda: wrapped.add_adapter("last", small))
    out[f"switch, {MANY} attached"] = timed(lambda: wrapped.set_adapter("m3"), 3)

    def off() -> None:
        with wrapped.disable_adapter():
            pass

    out[f"switch all off and on, {MANY} attached"] = timed(off, 3)
    out[f"detach one of {MANY}"] = timed(lambda: wrapped.delete_adapter("m5"))
    rest = [name for name in wrapped.peft_config if name != "a"]
    out[f"detach the other {MANY - 1}"] = timed(lambda: [wrapped.delete_adapter(name) for name in rest])
    return out


def commands(every: bool) -> dict[str, float]:
    """Measure commands of peftree, each in a process of its own; `every`: also those that take minutes."""
    words = (
        "import sys, time, io\nfrom peftree.cli import main\nsys.argv, out, sys.stdout = {}, sys.stdout, io.StringIO()"
    )
    words += "\ntry: main()\nexcept SystemExit: print(time.process_time(), file=out)"
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "70b", Path(folder) / "7b"
        for path, shape in ((large, PLAN), (small, PLAN | SEVEN)):
            path.mkdir()
            (path / "config.json").write_text(json.dumps(shape), "utf-8")
        asked = {"command: methods": ["methods"], "command: plan, one method, 70B": ["plan", str(large), "method=lora"]}
        if every:
            asked[ALL] = ["plan", str(small), "--table", "--json", "batch_size=4", "max_length=512"]
        return {name: float(_run(["-c", words.format(["peftree", *said])])) for name, said in asked.items()}


def _run(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """Return the medians of all operations."""
    runs: dict[str, list[dict[str, float]]] = {"peftree": [], "peft": []}
    for number in range(asked.rounds):
        for library in list(runs)[:: 1 if number % 2 else -1]:
            runs[library].append(json.loads(_run([__file__, library])))
        runs["peftree"][-1] |= commands(number == 0 and not os.environ.get("BENCH_SMALL"))
    own, other = ({n: statistics.median(r[n] for r in found if n in r) for n in found[0]} for found in runs.values())
    for name in own:
        goal, met = _goal(name, own, other.get(name))
        row: Row = {"row": name, "peftree": round(own[name], 6), "goal": goal, "met": "" if met else "missed"}
        row |= {"peft": round(other[name], 6)} if name in other else {}
        yield row if met else {**row, "why": f"{WHY.get(name, 'not explained yet')}."}


def _goal(name: str, own: dict[str, float], theirs: float | None) -> tuple[str, bool]:
    """Return the goal of an operation in words, and whether it is met; one without a goal is."""
    if name not in GOALS:
        return "", True
    most, of = GOALS[name]
    if of == "s":
        return f"{most:g} s", own[name] <= most
    if of == "x":
        return f"{most:g} of PEFT", theirs is None or own[name] <= most * theirs
    return f"{most:g} of '{of}'", own[name] <= most * own[of]


def main() -> None:
    """Measure one library in this process, which has imported nothing of either, or both in processes of their own."""
    if len(sys.argv) > 1 and sys.argv[1] in ("peftree", "peft"):
        import torch

        torch.set_num_threads(1)
        print(json.dumps(ours() if sys.argv[1] == "peftree" else theirs()))
        return
    from step import section

    section(measured, __doc__)


if __name__ == "__main__":
    main()
