"""The planner held against what was measured: allocator, processes, time; writes docs/plan-truth.md and .json.

    python benchmarks/plan.py                       # all of it
    python benchmarks/plan.py --parts allocator     # one of: allocator, processes, planning; the rest is kept

allocator: for every method, a tiny decoder, encoder and ViT, the traced peak of forward and backward beside the most
that torch's CPU allocator gave out. processes: real training of SmolLM2-135M, each run a fresh process, its peak
resident memory over that of the loaded model. planning: time and memory of a fresh process that plans a large model.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
FOUND, PAGE = ROOT / "docs/plan-truth.json", ROOT / "docs/plan-truth.md"
MIB = 1 << 20
ROWS, LENGTH, STEPS = 4, 128, 3
MODEL = "smollm2-135m"
LARGE = ("llama-2-7b", "llama-3-70b", "mixtral-8x7b")
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora, all linear": ("lora", {"sites": "linear", "r": 16}),
    "dora": ("dora", {}),
    "ia3": ("ia3", {}),
    "prompt_tuning": ("prompt_tuning", {}),
    "prefix_tuning": ("prefix_tuning", {}),
    "houlsby": ("houlsby", {}),
    "layernorm": ("layernorm", {}),
    "head_only": ("head_only", {}),
    "full": ("full", {}),
}
# glibc keeps freed memory below a threshold that grows as large pieces are freed; fixed, each large piece goes back.
MALLOC: dict[str, dict[str, str]] = {"default": {}, "fixed threshold": {"MALLOC_MMAP_THRESHOLD_": "131072"}}


def allocator() -> list[dict[str, Any]]:
    """Return traced and real peaks of every method, model and attention."""
    import plantruth
    from peftree import registry
    from peftree.errors import SiteError

    found = []
    gc.freeze()
    for model, key in plantruth.MODELS.items():
        for attention in plantruth.ATTENTIONS:
            for method in registry.methods():
                wanted = plantruth.asked(key, method, attention)
                try:
                    traced = plantruth.traced(key, wanted).timeline.peak()
                except SiteError:
                    continue
                real = plantruth.real_peak(key, wanted)
                found.append({"model": model, "attention": attention, "method": method, "traced": traced, "real": real})
    return found


def train(name: str) -> dict[str, Any]:
    """Train in this process and return what it took beyond the loaded model, and what was planned."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import peftree
    import plantruth
    from peftree.assets.models import model_folder
    from peftree.evaluate.cost import allocator_peak, current_rss, peak_rss, reset_peaks
    from peftree.plan import plan, request

    torch.set_num_threads(1)
    method, fields = RUNS[name]
    folder = str(model_folder(MODEL, quiet=True))
    asked = request(
        model=folder, method={"name": method, "fields": fields}, batch_size=ROWS, max_length=LENGTH, padded=False,
        device="cpu",
    )  # fmt: skip
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=4))  # fmt: skip

    def stepper(model: Any, adapter: Any, words: int) -> Any:
        ids = torch.randint(0, words, (ROWS, LENGTH))
        optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def step() -> None:
            plantruth.loss(model, adapter, {"input_ids": ids, "labels": ids.clone()}).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    warm = stepper(tiny.train(), peftree.adapt(tiny, method, **fields), 64)  # libraries take theirs before the count
    warm(), warm()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False  # as the Trainer sets it
    for p in model.parameters():
        p.data = p.data.clone()  # off the file's pages
    step = stepper(model.train(), peftree.adapt(model, method, **fields), model.config.vocab_size)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = current_rss()
    assert before is not None and reset_peaks(torch.device("cpu"))
    for _ in range(STEPS):
        step()
    measured = peak_rss() - before
    made = plan(asked)
    fixed = made.parts["weights"] + made.parts.get("adapter", 0)
    with plantruth.quiet():
        held = allocator_peak(step) + made.parts.get("optimizer", 0)
    return {
        "measured": measured, "low": made.low - fixed, "expected": made.expected - fixed, "high": made.high - fixed,
        "allocator": held, "fixed": fixed,
    }  # fmt: skip


def processes() -> list[dict[str, Any]]:
    """Return one row a method and setting of malloc, each run in a process of its own."""
    found = []
    for name in RUNS:
        for malloc, more in MALLOC.items():
            row = _child(["train", name], more)
            found.append({"method": name, "malloc": malloc} | row)
            print(name, malloc, {k: f"{v / MIB:.1f}" for k, v in row.items()}, flush=True)
    return found


def planned(name: str) -> dict[str, Any]:
    """Plan a large model in this process and return its time and memory, the imports' apart."""
    start = time.perf_counter()
    import transformers
    from transformers import AutoConfig

    from peftree.evaluate.cost import current_rss, peak_rss
    from peftree.plan import plan, request

    folder = ROOT / "tests/data/configs" / name
    config = AutoConfig.from_pretrained(str(folder))
    getattr(transformers, config.architectures[0])  # its module is imported here
    imported, base = time.perf_counter(), current_rss()
    made = plan(request(model=str(folder), method="lora", batch_size=4, max_length=2048))
    done = time.perf_counter()
    assert base is not None and made.how == "traced"
    return {"import": imported - start, "plan": done - imported, "base": base, "peak": peak_rss(), "low": made.low}


def planning() -> list[dict[str, Any]]:
    """Return one row a large model: median of three processes, and of three of the command line."""
    found = []
    for name in LARGE:
        rows = sorted((_child(["planned", name], {}) for _ in range(3)), key=lambda row: row["plan"])
        command = [str(Path(sys.executable).with_name("peftree")), "plan", str(ROOT / "tests/data/configs" / name)]
        command += ["--method", "lora", "--batch", "4", "--length", "2048"]
        times = []
        for _ in range(3):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        found.append({"model": name} | rows[1] | {"command": sorted(times)[1]})
        print(found[-1], flush=True)
    return found


def _child(words: list[str], more: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", *words], env=os.environ | more, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def page(data: dict[str, Any]) -> str:
    """Return the page of all tables."""
    return "\n".join(
        [
            "# The planner held against measurements",
            "",
            f"Written by `make bench-plan`. {data['machine']}.",
            "",
            *_allocator_page(data.get("allocator", [])),
            *_process_page(data.get("processes", [])),
            *_planning_page(data.get("planning", [])),
        ]
    )


def _allocator_page(rows: list[dict[str, Any]]) -> list[str]:
    exact = sum(row["traced"] == row["real"] for row in rows)
    most = max((abs(row["traced"] - row["real"]) for row in rows), default=0)
    columns = list(dict.fromkeys((row["model"], row["attention"]) for row in rows))
    cells = {(r["method"], r["model"], r["attention"]): 100 * (r["traced"] / r["real"] - 1) for r in rows}
    lines = [
        "## Every method beside torch's CPU allocator",
        "",
        "Peak of forward and backward, traced on tensors without values, beside the most bytes that the allocator",
        f"had given out in the same step of the real model (float32, random weights). {exact} of {len(rows)} are equal",
        f"to the byte, the others within {most} bytes. In % of the real peak; a dash: the model has nothing that the",
        "method adapts. MoLoRA's routers keep their loads until the next step, and the old ones may count.",
        "",
        "| method | " + " | ".join(f"{model}, {attention}" for model, attention in columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        shown = [f"{cells[method, *c]:+.2f}" if (method, *c) in cells else "-" for c in columns]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _process_page(rows: list[dict[str, Any]]) -> list[str]:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    exact = len({row["method"] for row in rows if row["low"] == row["allocator"]})
    lines = [
        "## Processes that train SmolLM2-135M",
        "",
        f"{ROWS} x {LENGTH} tokens, float32, fused AdamW, {STEPS} steps, one thread, each run a process of its own.",
        "Peak resident memory over that of the process with model and adapter loaded, in MiB, beside what is planned",
        "(`device=cpu`) beyond weights and adapter, and the most that the allocator gave out (with optimizer state).",
        f"{exact} of {len(methods)} plans equal the allocator to the byte; what a process has more, malloc keeps.",
        "`fixed`: glibc told to give large pieces back (`MALLOC_MMAP_THRESHOLD_=131072`).",
        "",
        "| method | allocator | low | expected | high | measured | / low | / expected | measured, fixed | / low |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    kinds = {(row["method"], row["malloc"]): row for row in rows}
    for method in methods:
        usual, fixed = (kinds[method, malloc] for malloc in MALLOC)
        bytes_ = [usual[k] for k in ("allocator", "low", "expected", "high", "measured")]
        lines.append(
            f"| {method} | " + " | ".join(f"{b / MIB:.1f}" for b in bytes_)
            + f" | {usual['measured'] / usual['low']:.3f} | {usual['measured'] / usual['expected']:.3f}"
            + f" | {fixed['measured'] / MIB:.1f} | {fixed['measured'] / fixed['low']:.3f} |"
        )  # fmt: skip
    return [*lines, "", *_summary(rows), ""]


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for malloc in MALLOC:
        mine = [row for row in rows if row["malloc"] == malloc]
        if mine:
            over = [row["measured"] / row["low"] for row in mine]
            key = "low" if MALLOC[malloc] else "expected"
            off = [abs(row["measured"] - row[key]) for row in mine]
            whole = [100 * o / (row["measured"] + row["fixed"]) for o, row in zip(off, mine, strict=True)]
            lines.append(
                f"* {malloc}: measured is {min(over):.3f} to {max(over):.3f} of low. Of the whole, weights and adapter"
                f" too, {key} is off by {sum(whole) / len(whole):.1f} % on average, {max(whole):.1f} % at most."
            )
    return lines


def _planning_page(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## What planning takes",
        "",
        "A fresh process that plans LoRA at 4 x 2048 tokens from a config alone. Import: torch, transformers and the",
        "model's module. Memory: resident at the peak, and how much of it came after the imports. Command: wall time",
        "of `peftree plan` as a whole. Medians of three.",
        "",
        "| model | import, s | plan, s | command, s | resident, MiB | of that planning, MiB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['import']:.1f} | {r['plan']:.1f} | {r['command']:.1f} | {r['peak'] / MIB:.0f}"
            f" | {(r['peak'] - r['base']) / MIB:.0f} |"
        )
    return [*lines, ""]


def machine() -> str:
    """Return processor and versions in a line."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    versions = f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"CPU {processor}, threads 1, {versions}"


def main() -> None:
    """Measure what was asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"allocator": allocator, "processes": processes, "planning": planning}
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, name = given.child
        print(json.dumps({"train": train, "planned": planned}[kind](name)))
        return
    data = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    for part in given.parts:
        data |= {part: parts[part](), "machine": machine()}
        rows = (f' "{k}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in v) + "\n ]" for k, v in _tables(data))
        FOUND.write_text(f'{{\n "machine": "{data["machine"]}",\n' + ",\n".join(rows) + "\n}\n", "utf-8")
    PAGE.write_text(page(data), "utf-8")


def _tables(data: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(key, value) for key, value in data.items() if isinstance(value, list)]


if __name__ == "__main__":
    main()
