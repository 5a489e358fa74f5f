"""Step time and memory of peftree beside Hugging Face PEFT: same base weights, same batch, interleaved, one thread.

    python benchmarks/step.py [--rounds 9] [--whole] [--json out.json]

Time is process CPU time of one training step (forward, backward, AdamW); in every round all variants run once in
rotated order; the ratio peftree / PEFT is taken within a round and its median and quartiles are reported, beside the
same ratio of PEFT and a second copy of PEFT's model, which shows what the machine's noise alone does. Memory is
exact: bytes of the distinct storages that the graph keeps for the backward pass (parameters left out), and the peak
of the allocator in a step. With `--whole` all 30 layers and the head of SmolLM2-135M, else a body of few layers.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from peftree.evaluate.cost import saved_bytes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_ALL = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


def smol(layers: int, whole: bool) -> nn.Module:
    """Return the SmolLM2-135M shape with random weights."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, rms_norm_eps=1e-5, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config) if whole else LlamaModel(config)


def bert(layers: int) -> nn.Module:
    """Return the BERT-base shape without dropout."""
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False)


def ours(base: nn.Module, method: str, fields: dict[str, Any]) -> nn.Module:
    """Return a copy of `base` with a peftree adapter."""
    import peftree

    model = copy.deepcopy(base)
    peftree.adapt(model, method, **fields)
    return model


def theirs(base: nn.Module, config: Callable[[], Any]) -> nn.Module:
    """Return a copy of `base` under Hugging Face PEFT."""
    import peft

    model: nn.Module = peft.get_peft_model(copy.deepcopy(base), config())
    return model


def variants(kind: str) -> dict[str, tuple[tuple[str, dict[str, Any]], Callable[[], Any]]]:
    """Return name -> (peftree method and fields, PEFT config)."""
    import peft

    llama = kind != "bert"
    qv, every = (["q_proj", "v_proj"], ALL) if llama else (["query", "value"], BERT_ALL)
    feed = "down_proj" if llama else "output.dense"
    feed_all = ["k_proj", "v_proj", "down_proj"] if llama else ["key", "value", r"layer.\d+.output.dense"]
    task = "CAUSAL_LM" if kind == "whole" else "FEATURE_EXTRACTION"
    ia3_targets: Any = feed_all if llama else r".*(key|value|layer\.\d+\.output\.dense)"
    ia3_feed: Any = [feed] if llama else r".*layer\.\d+\.output\.dense"
    lora = lambda t, **k: lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=t, **k)  # noqa: E731
    return {
        "lora q,v": (("lora", {"r": 8}), lora(qv)),
        "lora all": (("lora", {"r": 8, "sites": "linear"}), lora(every)),
        "dora q,v": (("dora", {"r": 8, "sites": "attn.q attn.v"}), lora(qv, use_dora=True)),
        "dora all": (("dora", {"r": 8, "sites": "linear"}), lora(every, use_dora=True)),
        "ia3": (
            ("ia3", {}),
            lambda: peft.IA3Config(target_modules=ia3_targets, feedforward_modules=ia3_feed),
        ),
        "prompt 20": (
            ("prompt_tuning", {"length": 20}),
            lambda: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=20),
        ),
        "prefix 20": (
            ("prefix_tuning", {"length": 20}),
            lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=20),
        ),
    }


class Step:
    """One training step of one variant."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model = model.train()
        self.batch = batch
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4)

    def loss(self) -> Tensor:
        out = self.model(**self.batch)
        loss: Tensor = out.loss if "labels" in self.batch else out.last_hidden_state.square().mean()
        return loss

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def peak_bytes(step: Step) -> int:
    """Return the peak of allocator bytes within one step, above what was there before it."""
    step()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def compare(pair: dict[str, Step], rounds: int) -> dict[str, Any]:
    """Run all steps `rounds` times in rotated order; return CPU seconds per variant and round."""
    names = list(pair)
    for name in names:
        pair[name]()
    seconds: dict[str, list[float]] = {n: [] for n in names}
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order:
            start = time.process_time()
            pair[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def spread(mine: list[float], other: list[float]) -> tuple[float, tuple[float, float]]:
    """Return median and quartiles of the ratios within each round."""
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), (quarters[0], quarters[2])


def row(base: nn.Module, batch: dict[str, Tensor], name: str, kind: str, rounds: int) -> dict[str, Any]:
    """Measure one method on both libraries."""
    (method, fields), config = variants(kind)[name]
    pair = {
        "peftree": Step(ours(base, method, fields), batch),
        "peft": Step(theirs(base, config), batch),
        "again": Step(theirs(base, config), batch),
    }
    counts = {k: sum(p.numel() for p in s.params) for k, s in pair.items()}
    seconds = compare(pair, rounds)
    ratio, quartiles = spread(seconds["peftree"], seconds["peft"])
    noise, noise_quartiles = spread(seconds["again"], seconds["peft"])
    pair.pop("again")
    saved = {k: saved_bytes(s.loss, s.model) for k, s in pair.items()}
    peak = {k: peak_bytes(s) for k, s in pair.items()}
    return {
        "shape": kind, "method": name, "trainable": counts,
        "seconds": {k: statistics.median(v) for k, v in seconds.items()},
        "time_ratio": ratio, "time_quartiles": quartiles, "noise_ratio": noise, "noise_quartiles": noise_quartiles,
        "saved_bytes": saved, "saved_ratio": saved["peftree"] / saved["peft"],
        "peak_bytes": peak, "peak_ratio": peak["peftree"] / peak["peft"],
    }  # fmt: skip


def bases(args: argparse.Namespace) -> list[tuple[str, nn.Module, dict[str, Tensor]]]:
    """Return the shapes to measure, each with a batch of 8 x 128 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 20000, (8, 128), generator=generator)
    mask = torch.ones_like(ids)
    out = [("smol", smol(args.layers, False), {"input_ids": ids, "attention_mask": mask})]
    out.append(("bert", bert(args.layers), {"input_ids": ids, "attention_mask": mask}))
    if args.whole:
        out.append(("whole", smol(30, True), {"input_ids": ids, "attention_mask": mask, "labels": ids}))
    return out


def machine() -> dict[str, Any]:
    """Describe where this ran."""
    import peft
    import transformers

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")),
        "",
    )
    return {
        "cpu": model or platform.processor(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    lines = [
        "# Step time and memory beside Hugging Face PEFT", "",
        "Written by `make bench-step`. " + ", ".join(f"{k} {v}" for k, v in result["machine"].items()) + ".", "",
        f"8 x 128 tokens, float32, AdamW, {result['rounds']} rounds. Ratios: peftree / PEFT; below 1 is less.", "",
        "Noise: PEFT's model beside a second copy of itself, in the same rounds; a ratio within its quartiles is no "
        "difference shown. `smol` and `bert` are bodies of few layers; `whole` is all of SmolLM2-135M with its head "
        "of 49,152 words, on which most of a step is spent, and which no adapter changes.", "",
        "| shape | method | trainable (ours, PEFT) | CPU time | quartiles | noise | quartiles | saved for backward "
        "| allocator peak |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for r in result["steps"]:
        a, b = r["trainable"]["peftree"], r["trainable"]["peft"]
        (low, high), (least, most) = r["time_quartiles"], r["noise_quartiles"]
        lines.append(
            f"| {r['shape']} | {r['method']} | {a:,} / {b:,} | {r['time_ratio']:.3f} | {low:.3f}-{high:.3f} "
            f"| {r['noise_ratio']:.3f} | {least:.3f}-{most:.3f} "
            f"| {r['saved_ratio']:.3f} | {r['peak_ratio']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--only", default="", help="methods, divided by semicolons")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": machine(),
        "rounds": args.rounds,
        "steps": [],
    }
    for kind, base, batch in bases(args):
        for name in variants(kind):
            if args.only and name not in args.only.split(";"):
                continue
            measured = row(base, batch, name, kind, args.rounds)
            result["steps"].append(measured)
            print(
                f"{kind:6} {name:10} time {measured['time_ratio']:.3f} saved {measured['saved_ratio']:.3f} "
                f"peak {measured['peak_ratio']:.3f} s {measured['seconds']}",
                file=sys.stderr,
            )
            gc.collect()
    text = markdown(result)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
