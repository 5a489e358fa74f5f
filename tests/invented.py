"""Invented run records for the tests of statistics and report: no figure in them was ever measured."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from peftree.runs.record import CurvePoint, RunRecord

TASKS: list[dict[str, Any]] = [
    {"task": "text-classification", "dataset": "reviews", "model": "MiniLM-L6", "total": 22_700_000,
     "modality": "language", "kind": "understanding", "metric": "accuracy", "items": 400,
     "top": 0.86, "floor": 0.61, "load": 420, "higher_is_better": True},
    {"task": "text-generation", "dataset": "stories", "model": "SmolLM2-135M", "total": 134_515_008,
     "modality": "language", "kind": "generation", "metric": "perplexity", "items": 120,
     "top": 2.45, "floor": 3.05, "load": 980, "higher_is_better": False},
    {"task": "image-classification", "dataset": "leaves", "model": "ViT-Ti/16", "total": 5_717_416,
     "modality": "vision", "kind": "understanding", "metric": "accuracy", "items": 300,
     "top": 0.93, "floor": 0.70, "load": 380, "higher_is_better": True},
]  # fmt: skip
METHODS: list[tuple[str, str, float, float, float]] = [
    # name, branch, share of parameters, part of full's gain, share of full's extra memory
    ("full", "reference", 1.0, 1.0, 1.0),
    ("head_only", "reference", 0.0004, 0.0, 0.05),
    ("houlsby", "additive", 0.021, 0.97, 0.42),
    ("prompt_tuning", "additive", 0.0006, 0.35, 0.40),
    ("ia3", "additive", 0.0009, 0.72, 0.39),
    ("bitfit", "selective", 0.0012, 0.80, 0.37),
    ("layernorm", "selective", 0.0007, 0.66, 0.36),
    ("lora", "reparameterized", 0.012, 0.99, 0.43),
    ("dora", "reparameterized", 0.0125, 1.0, 0.55),
    ("mam", "hybrid", 0.019, 0.98, 0.47),
    ("molora", "moe", 0.046, 1.02, 0.61),
    ("propetl", "unified", 0.0061, 0.93, 0.45),
]
ENVIRONMENT = {"peftree": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2",
               "machine": "x86_64, 2 cores", "threads": 1}  # fmt: skip


def fabricated(seeds: int = 2, *, failures: bool = True) -> list[RunRecord]:
    """Return invented but plausible records: 3 tasks x 12 methods x `seeds`, two of them failed."""
    return [
        one_record(task, method, seed, failed=failures and seed == 1 and bad)
        for task in TASKS
        for method in METHODS
        for seed in range(seeds)
        for bad in [(task["metric"], method[0]) in {("perplexity", "dora"), ("accuracy", "ia3")}]
    ]


def one_record(
    task: dict[str, Any], method: tuple[str, str, float, float, float], seed: int, *, failed: bool
) -> RunRecord:
    """Return one invented run; the items' difficulty is shared by all methods of a task."""
    name, branch, share, gain, memory = method
    index = [m[0] for m in METHODS].index(name)
    rng = np.random.default_rng([seed, index, task["items"]])
    level = task["floor"] + gain * (task["top"] - task["floor"]) + rng.normal(0, 0.004)
    difficulty = np.random.default_rng(task["items"]).uniform(size=task["items"])
    loss = not task["higher_is_better"]
    if loss:
        items = level + 0.5 * (difficulty - difficulty.mean()) + rng.normal(0, 0.05, task["items"])
    else:
        items = (0.85 * difficulty + 0.15 * rng.uniform(size=task["items"]) < level).astype(float)
    trainable = int(share * task["total"])
    steps = np.arange(0, 200, 5)
    losses = 0.25 + 1.2 * np.exp(-steps / (25 + 60 * (1 - gain))) + rng.normal(0, 0.04, len(steps))
    extra = (memory * 16 * task["total"]) + 90e6
    mib = 1 << 20
    shared: dict[str, Any] = {
        "suite": "fabricated", "task": task["task"], "dataset": task["dataset"],
        "model": task["model"], "modality": task["modality"], "kind": task["kind"],
        "method": name, "branch": branch, "fields": {"r": 8} if "lora" in name else {},
        "budget": {"steps": 200}, "learning_rate": 1e-3, "seed": seed, "metric": task["metric"],
        "higher_is_better": task["higher_is_better"],
        "aggregate": "exp_mean" if loss else "mean",
        "environment": ENVIRONMENT, "started": datetime(2025, 1, 1, 12, tzinfo=UTC),
        "trainable_parameters": trainable, "total_parameters": task["total"], "n_train": 800,
    }  # fmt: skip
    if failed:
        return RunRecord(**shared, status="failed",
                         error="Traceback (most recent call last):\nTrainError: the loss of step "
                               "37 is not finite. Lower the learning rate.")  # fmt: skip
    return RunRecord(
        **shared, status="ok", items=tuple(items.tolist()),
        score=float(np.exp(items.mean()) if loss else items.mean()),
        steps=200, batch_size=8, sites=24, adapter_bytes=trainable * 4 + 2048,
        peak_rss_bytes=int(task["load"] * mib + extra), rss_after_load_bytes=task["load"] * mib,
        saved_for_backward_bytes=int(0.55 * extra), setup_seconds=2.5,
        train_seconds=20 + 30 * memory + float(rng.normal(0, 1)), eval_seconds=4.0,
        cpu_seconds=30.0, step_seconds=0.1 + 0.15 * memory,
        curve=tuple(CurvePoint(step=int(s), loss=float(x), score=level if s % 50 == 0 else None)
                    for s, x in zip(steps, losses, strict=True)),
    )  # fmt: skip


HOSTILE = '<script>alert(1)</script>"\x1b[31m\u202e&lt;|`[x](y)'


def hostile() -> list[RunRecord]:
    """Records whose every free text tries to break out."""
    change = {"method": HOSTILE, "task": HOSTILE, "dataset": HOSTILE, "model": HOSTILE,
              "suite": HOSTILE, "metric": HOSTILE, "fields": {HOSTILE: HOSTILE},
              "environment": {HOSTILE: HOSTILE}}  # fmt: skip
    first = [r for r in fabricated(failures=False) if r.task == "text-classification"]
    out = [r.model_copy(update={**change, "method": r.method + HOSTILE}) for r in first]
    bad = {"status": "failed", "error": HOSTILE + "\n" + HOSTILE, "score": None}
    return [out[0].model_copy(update=bad), *out[1:]]


RATES = np.geomspace(1e-5, 1e-2, 8)
STUDY = [{**task, "task": f"{task['task']}-{index}" if index else task["task"]} for index in range(2) for task in TASKS]


def study(
    tasks: Sequence[dict[str, Any]] = STUDY, methods: Sequence[Any] = METHODS, seeds: int = 3, trials: int = 8
) -> list[RunRecord]:
    """Return an invented suite: trials that may diverge, final runs with probes, one method not applicable."""
    out = []
    for number, task in enumerate(tasks):
        for method in methods:
            index = [m[0] for m in METHODS].index(method[0].partition("@")[0])
            for trial in range(trials):
                out.append(_trial(task, method, trial, index))
            for seed in range(seeds):
                record = one_record(task, (METHODS[index][0], *method[1:]), seed, failed=False)
                size = record.trainable_parameters or 0
                change: dict[str, Any] = {
                    "method": method[0], "probes": _probes(task, index, seed, number), "data": "d" * 64,
                    "suite_hash": "a" * 64, "gradient_bytes": 4 * size, "optimizer_bytes": 8 * size,
                    "throughput": 100.0 - index, "values": {"f1": 0.5 + index / 100},
                    "throughput_unit": "images/s" if task["modality"] == "vision" else "tokens/s",
                }  # fmt: skip
                if method[0] == "molora" and task["modality"] == "vision":
                    change |= {"status": "inapplicable", "error": "MethodError: molora routes no image."}
                    change |= {"score": None, "items": ()}
                out.append(record.model_copy(update=change))
    return out


def _trial(task: dict[str, Any], method: Any, trial: int, index: int) -> RunRecord:
    base = one_record(task, (METHODS[index][0], *method[1:]), 100 + trial, failed=False)
    rate = float(RATES[trial % len(RATES)]) * (1 + 0.01 * (trial // len(RATES)))
    far = abs(np.log10(rate / 1e-3) - 0.1 * (index % 4))
    level = method[3] * np.exp(-0.35 * far**2)
    score = task["floor"] + level * (task["top"] - task["floor"])
    change: dict[str, Any] = {
        "method": method[0], "phase": "trial", "learning_rate": rate, "seed": 10_000 + trial, "items": (),
        "curve": (), "score": float(score), "data": "d" * 64, "suite_hash": "a" * 64,
    }  # fmt: skip
    if rate > 5e-3 and index % 3 == 0:
        change |= {"status": "diverged", "error": "the loss is not finite", "score": None}
    return base.model_copy(update=change)


def _probes(task: dict[str, Any], index: int, seed: int, number: int) -> dict[str, Any]:
    """Return probes in the form in which runs record them."""
    higher, rng = task["higher_is_better"], np.random.default_rng([index, seed, number])
    near, noise = 0.02 + 0.005 * index, rng.normal(0, 0.003, 8).tolist()
    clean = task["top"] - 0.01 * index if higher else task["top"] + 0.01 * index
    step = -0.05 if higher else 0.1
    levels = [clean + step * (level + 1) * (1 + index / 20) for level in range(5)]
    kinds = {"swap": levels, "drop": [value + step / 2 for value in levels]}
    out: dict[str, Any] = {
        "latency": {"unit": "ms", "off": 10.0, "on": 10.0 + index / 4, "merged": 10.0 + noise[0]},
        "retention": {"measure": "knn accuracy" if higher else "perplexity", "before": 0.8, "change": -near,
                      "after": 0.8 - near + noise[1] if higher else 0.8 + near,
                      "low": -near - 0.02, "high": -near + 0.02, "items": 40},
        "interpretability": {"relative_update": near, "effective_rank": 4.0 + index, "stable_rank": 1.5,
                             "intruders": {"0.5": 1.5, "0.9": 6.0}, "cka": [1.0, 0.98 - near, 0.9 - near],
                             "knockout": {"layer 1": -0.01, "layer 2": -near}},
    }  # fmt: skip
    out["corruptions" if task["modality"] == "vision" else "noise"] = {
        "clean": clean,
        "severities": levels,
        "kinds": kinds,
        "drop": (1 if higher else -1) * (clean - sum(levels) / 5),
        "metric": task["metric"],
        "items": 40,
    }
    if index == 1:
        out["interpretability"] = {"not measured": "head_only changes no weight matrix inside the layers."}
    if index == 10:
        out["interpretability"] |= {"routing": {"load": [0.6, 0.3, 0.1], "entropy": 0.8}}
    if task["kind"] == "understanding":
        part = {"low": 0.5, "high": 1.0, "count": 3, "accuracy": 0.5, "confidence": 0.7}
        out["calibration"] = {"ece": near, "brier": 0.2, "nll": 0.5, "accuracy": clean, "confidence": clean + near}
        out["calibration"] |= {"items": 40, "bins": [part]}
    if number % 3 == 0:
        out["shift"] = {"other domain": {"score": 0.5, "items": [0.0, 1.0] * 40}}
        names = [task["task"], "second", "third"]
        out["sequence"] = {
            "tasks": names,
            "scores": [[clean, 0.4, 0.3], [clean - near, 0.8, 0.5], [clean - 2 * near, 0.7, 0.9]],
        }
    return out
