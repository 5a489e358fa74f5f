"""A training step beside Hugging Face PEFT's, and what all sections of the benchmark share: shapes, steps, timing.

    python benchmarks/step.py [step | precision | settings] [--rounds 9] [--only "smol, lora all"] [--plain]

Same base weights, same batch, one thread. Time is process CPU time of one step (forward, backward, AdamW); in every
round all variants run once, in rotated order; ratios are taken within a round. `again` is a second copy of PEFT's
model: what the machine's noise alone does. `floor` is the frozen model, whose gradient flows to its inputs and trains
nothing. Memory is exact: bytes of the distinct storages that the graph keeps for the backward pass (parameters left
out), and the peak of the allocator in a step. `--plain` adds peftree with its fast forms off.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import copy
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from peftree.deltas.fused import fast_forms
from peftree.evaluate.cost import allocator_peak, saved_bytes

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_ALL = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
FEW = ("lora q,v", "lora all", "lora all, dropout .05", "dora all")  # measured on BERT too
LORA = {"r": 8, "sites": "linear"}
SLOT = 0.05  # seconds: a shorter step is repeated until a measurement takes as long
FEWEST = 3  # rounds, however little time is left
SMALL = bool(os.environ.get("BENCH_SMALL"))  # one layer, 1 x 16 tokens: to try the scripts, not to measure
PRECISIONS = {
    "float32": (torch.float32, None),
    "autocast-bf16": (torch.float32, torch.bfloat16),
    "bf16-base": (torch.bfloat16, None),
    "bf16-base-autocast": (torch.bfloat16, torch.bfloat16),
}
Row = dict[str, Any]
Around = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


def smol(layers: int, whole: bool) -> nn.Module:
    """Return the SmolLM2-135M shape with random weights."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1 if SMALL else layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, rms_norm_eps=1e-5, use_cache=False,
        max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config) if whole else LlamaModel(config)


def bert(layers: int) -> nn.Module:
    """Return the BERT-base shape without dropout."""
    layers = 1 if SMALL else layers
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False)


def tokens(rows: int, length: int, labels: bool = False) -> dict[str, Tensor]:
    """Return a batch of random tokens."""
    rows, length = (1, min(length, 16)) if SMALL else (rows, length)
    ids = torch.randint(5, 20000, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | ({"labels": ids} if labels else {})


def ours(base: nn.Module, method: str, fields: dict[str, Any], times: int = 1) -> nn.Module:
    """Return a copy of `base` with a peftree adapter, or with several of its kind."""
    import peftree

    model = copy.deepcopy(base)
    for number in range(times):
        peftree.adapt(model, method, name=f"a{number}", **fields)
    return model


def theirs(base: nn.Module, config: Callable[[], Any], times: int = 1, **more: Any) -> nn.Module:
    """Return a copy of `base` under Hugging Face PEFT, with an adapter or several of its kind."""
    import peft

    model: Any = peft.get_peft_model(copy.deepcopy(base), config(), **more)
    for number in range(1, times):
        model.add_adapter(f"a{number}", config())
        model.base_model.set_adapter(["default", *(f"a{n}" for n in range(1, number + 1))])
    return model  # type: ignore[no-any-return]


def floor(base: nn.Module) -> nn.Module:
    """Return a frozen copy of `base` whose gradient flows down to its embeddings."""
    model: Any = copy.deepcopy(base).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_())
    return model  # type: ignore[no-any-return]


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
        "lora all": (("lora", LORA), lora(every)),
        "lora all, dropout .05": (("lora", {**LORA, "dropout": 0.05}), lora(every, lora_dropout=0.05)),
        "two loras": (("lora", LORA), lora(every)),
        "dora q,v": (("dora", {"r": 8, "sites": "attn.q attn.v"}), lora(qv, use_dora=True)),
        "dora all": (("dora", LORA), lora(every, use_dora=True)),
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
    """One training step of one variant.

    `around` makes what the forward pass runs in; `precision` is torch's switch for float32 products, None leaves it.
    """

    def __init__(
        self, model: nn.Module, batch: dict[str, Tensor], around: Around | None = None, precision: str | None = None,
        **optimizer: Any,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.around, self.precision = model.train(), batch, around, precision
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, **optimizer) if self.params else None

    def loss(self) -> Tensor:
        """Return the loss."""
        if self.precision is not None:  # the backward pass follows at once
            torch.set_float32_matmul_precision(self.precision)
        with self.around(self.model) if self.around is not None else contextlib.nullcontext():
            out = self.model(**self.batch)
            loss: Tensor = out.loss if "labels" in self.batch else out.last_hidden_state.square().mean()
        return loss

    def __call__(self) -> None:
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def cast(low: torch.dtype | None, fast: bool = True) -> Around:
    """Return what a forward pass under autocast to `low` runs in, with or without peftree's fast forms."""

    @contextlib.contextmanager
    def around(_: nn.Module) -> Iterator[None]:
        with fast_forms(fast), torch.autocast("cpu", low) if low else contextlib.nullcontext():
            yield

    return around


def compare(
    pair: dict[str, Callable[[], Any]], rounds: int, seconds: float = math.inf, fewest: int = FEWEST
) -> dict[str, list[float]]:
    """Run all `rounds` times in rotated order; return the CPU seconds of each by round.

    Once `seconds` have passed no round is begun, but for the first `fewest`. The first pass of each is not counted.
    """
    names, times = list(pair), {}
    for name in names:
        for _ in range(2):
            begin = time.process_time()
            pair[name]()
            spent = time.process_time() - begin
            if spent > 1 or SMALL:
                break
        times[name] = 1 if SMALL else max(1, math.ceil(SLOT / max(spent, 1e-4)))
    end = time.monotonic() + seconds
    found: dict[str, list[float]] = {n: [] for n in names}
    for turn in range(rounds):
        if turn >= fewest and time.monotonic() > end:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.process_time()
            for _ in range(times[name]):
                pair[name]()
            found[name].append((time.process_time() - begin) / times[name])
    return found


def spread(mine: list[float], other: list[float]) -> tuple[float, tuple[float, float]]:
    """Return median and quartiles of the ratios within each round."""
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), (quarters[0], quarters[2])


def ratios(found: dict[str, list[float]], over: str) -> Row:
    """Return of each variant the median and quartiles [median, low, high] of its time over another's, and seconds."""
    out: Row = {"rounds": len(found[over]), "seconds": round(statistics.median(found[over]), 5)}
    for name, seconds in found.items():
        if name != over:
            median, quartiles = spread(seconds, found[over])
            out[name] = [round(v, 4) for v in (median, *quartiles)]
    return out


def beside(steps: dict[str, Step], asked: argparse.Namespace, share: float, over: str = "peft") -> Row:
    """Compare steps: ratios of time over one of them, and the exact bytes of each but `again`."""
    found = ratios(compare(steps, asked.rounds, asked.seconds * share), over)
    for name, step in steps.items():
        if name != "again":
            found[f"{name} saved_bytes"] = saved_bytes(step.loss, step.model)
            # What oneDNN takes inside a product of bfloat16 hangs on the CPU.
            with torch.backends.mkldnn.flags(False, None, None, None):
                found[f"{name} peak_bytes"] = allocator_peak(step)
    return found


def cases(asked: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """Return the rows of a part as (row, shape, precision, method)."""
    if asked.part == "precision":
        found = [("smol", "autocast-bf16", name) for name in ("lora all", "lora all, dropout .05", "dora all")]
        found.append(("smol", "bf16-base", "lora all"))
        return [(f"{shape}, {precision}, {name}", shape, precision, name) for shape, precision, name in found]
    names = [("smol", name) for name in variants("smol")] + [("bert", name) for name in FEW]
    return [(f"{shape}, {name}", shape, "float32", name) for shape, name in names]


def methods(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure methods in one precision: peftree, PEFT, a copy of PEFT's model, and the frozen model."""
    wanted = [case for case in cases(asked) if not asked.only or case[0] in asked.only]
    for row, shape, precision, name in wanted:
        dtype, low = PRECISIONS[precision]
        base = (bert(2) if shape == "bert" else smol(2, False)).to(dtype)
        batch = tokens(8 if precision == "float32" else 2, 128)
        (method, fields), config = variants(shape)[name]
        times = 2 if name == "two loras" else 1
        put = partial(Step, batch=batch, around=cast(low))
        steps = {
            "peftree": put(ours(base, method, fields, times)),
            "peft": put(theirs(base, config, times)),
            "again": put(theirs(base, config, times)),
            "floor": put(floor(base)),
        }
        if asked.plain:
            steps["plain"] = Step(ours(base, method, fields, times), batch, cast(low, fast=False))
        if dtype != torch.float32:
            steps["low"] = put(theirs(base, config, times, autocast_adapter_dtype=False))
        counts = {n: sum(p.numel() for p in steps[n].params) for n in ("peftree", "peft")}
        assert counts["peftree"] == counts["peft"], counts
        yield {"row": row, "trainable": counts["peft"], **beside(steps, asked, 1 / len(wanted))}


def settings(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure LoRA under PEFT's and torch's faster or smaller settings, on both sides, over PEFT at its defaults."""
    base, batch, (_, config) = smol(2, False), tokens(8, 128), variants("smol")["lora all"]
    kinds: dict[str, dict[str, Any]] = {
        "defaults": {},
        "AdamW fused": {"fused": True},
        "products `medium`": {"precision": "medium"},
        "fused and `medium`": {"fused": True, "precision": "medium"},
        "gradient checkpointing": {},
    }
    steps = {}
    for kind, more in kinds.items():
        for side, model in (("peftree", ours(base, "lora", LORA)), ("peft", theirs(base, config))):
            if kind == "gradient checkpointing":
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            steps[f"{side} {kind}"] = Step(model, batch, **{"precision": "highest", **more})
    seconds = compare(steps, asked.rounds, asked.seconds)
    for kind in kinds:
        found = ratios({k: seconds[k] for k in {"peft defaults": 0, f"peftree {kind}": 0, f"peft {kind}": 0}},
                       "peft defaults")  # fmt: skip
        median, quartiles = spread(seconds[f"peftree {kind}"], seconds[f"peft {kind}"])
        row = {"row": kind, "rounds": found["rounds"], "seconds": found["seconds"], "peftree": [median, *quartiles]}
        for side in ("peftree", "peft"):
            row[f"{side} over defaults"] = found.get(f"{side} {kind}", [1.0, 1.0, 1.0])
            step = steps[f"{side} {kind}"]
            row[f"{side} saved_bytes"], row[f"{side} peak_bytes"] = (
                saved_bytes(step.loss, step.model),
                allocator_peak(step),
            )
        yield row


def machine() -> dict[str, Any]:
    """Describe where this ran."""
    import peft
    import transformers

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    told = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in told.items()}
    kind = f" family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return {
        "cpu": facts.get("model name", platform.processor()) + kind, "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
    }  # fmt: skip


def section(measure: Callable[[argparse.Namespace], Iterable[Row]], about: str | None, **own: Any) -> None:
    """Run one section from the command line: print each row as it is measured, and write them all as JSON.

    `measure` gets the rounds, the seconds it may take, the rows that are asked for (none: all) and the part.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--json", type=Path)
    for name, kind in own.items():
        parser.add_argument(f"--{name}", **kind)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    # So that processes import compiled modules of peftree, as of PEFT: pip compiles what it installs, not a checkout.
    compileall.compile_dir(Path(__file__).parents[1] / "src", quiet=1)
    rows = []
    for row in measure(asked):
        rows.append(row)
        gc.collect()
        print(json.dumps(row), file=sys.stderr, flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "rows": rows}), "utf-8")


def measured(asked: argparse.Namespace) -> Iterator[Row]:
    """Measure the part that is asked for."""
    return (settings if asked.part == "settings" else methods)(asked)


if __name__ == "__main__":
    section(measured, __doc__, plain={"action": "store_true"})
