"""Training by two processes equals training by one with the same rows in each step, stops as one, and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler

from peftree.errors import ConfigError, TrainError
from peftree.settings import load_config
from peftree.train.checkpoint import damage
from peftree.train.parts import Again, Part, Weightless
from peftree.train.processes import Team, join, team
from peftree.train.run import run
from peftree.train.share import items
from train.tiny import WORDS, reviews, write_csv, write_jsonl

HERE = Path(__file__).resolve().parent
ROWS = 28  # of 4 in each pass: 7 passes, so that the last step of two processes has one
STILL = ["config.hidden_dropout_prob=0", "config.attention_probs_dropout_prob=0"]
LEVEL = "max_length=4"  # all batches are as long: AdaMix's own term counts padding
# method, fields, settings of one process, settings of two, and whether rows are reviews (else prompts).
CASES: dict[str, tuple[list[str], list[str], list[str], bool]] = {
    "lora": ([], ["batch_size=8"], ["batch_size=4"], True),
    "houlsby": ([], ["batch_size=8"], ["batch_size=4"], True),
    "prefix_tuning": (["method.length=2"], ["batch_size=8"], ["batch_size=4"], False),
    "prompt_tuning": (["method.length=2"], ["batch_size=8"], ["batch_size=4"], False),
    "lst": ([], ["batch_size=8"], ["batch_size=4"], True),
    "adalora": (["method.warmup=0.25", "method.final=0.25", "method.interval=1"], ["batch_size=8"], ["batch_size=4"], True),
    "adamix": ([LEVEL], ["batch_size=8"], ["batch_size=4"], True),
    "dylora": ([], ["batch_size=4", "accumulation=2"], ["batch_size=4"], True),
    "molora": ([], ["batch_size=4", "accumulation=2"], ["batch_size=4"], True),
    "fishmask": ([], ["batch_size=4", "accumulation=2"], ["batch_size=4"], True),
    "accumulated": (["method=lora"], ["batch_size=2", "accumulation=4"], ["batch_size=2", "accumulation=2"], False),
    "recomputed": (["method=adamix", LEVEL, "gradient_checkpointing=true"], ["batch_size=8"], ["batch_size=4"], True),
    "patient": (["method=lora", "early_stopping=1", "eval_every=1", "lr=1e-9"], ["batch_size=8"], ["batch_size=4"], True),
}


def started(*command: str, **variables: str) -> subprocess.Popen[str]:
    """Start torchrun's two processes of a Python command line."""
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-m", *torchrun, "--rdzv-endpoint", "localhost:0", *command],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str], code: int | None = 0) -> str:
    """Return what a process said, once it has ended with this code; None: any but 0."""
    try:
        said = process.communicate(timeout=240)[1]
    finally:
        process.kill()
    assert process.returncode == code if code is not None else process.returncode, said
    return said


def many(folder: Path, jobs: list[list[str]], code: int | None = 0, **variables: str) -> str:
    """Train jobs in the same two processes."""
    path = folder / f"jobs{len(list(folder.glob('jobs*')))}.json"
    path.write_text(json.dumps(jobs))
    return finished(started(str(HERE / "several.py"), str(path), **variables), code)


def far(one: Path, two: Path) -> float:
    """Return the largest difference of two adapters, relative to each tensor's largest entry."""
    first, second = (load_file(p / "adapter.safetensors") for p in (one, two))
    assert first.keys() == second.keys()
    return max(
        float((first[k].double() - second[k].double()).abs().max() / first[k].double().abs().max().clamp_min(1e-30))
        for k in first
    )


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Reviews and prompts."""
    for split, n in (("train", ROWS), ("valid", 8)):
        (tmp_path / "reviews").mkdir(exist_ok=True)
        (tmp_path / "prompts").mkdir(exist_ok=True)
        write_csv(tmp_path / "reviews" / f"{split}.csv", reviews(n, len(split)))
        told = [(f"the {WORDS[i % 4]} film w{i % 20}", f"{WORDS[i % 4]} a plot"[: 20 - i % 3]) for i in range(n)]
        write_jsonl(tmp_path / "prompts" / f"{split}.jsonl", told)
    return tmp_path


def words(rows: Path, model: str, text: bool, output: Path, *more: str) -> list[str]:
    """Return the settings of a run of four steps."""
    data = [f"model={model}", f"data={rows / ('reviews' if text else 'prompts')}", f"output={output}"]
    return [*data, *(STILL if text else []), "epochs=1", "log_every=1", "base_score=false", "save_every=0",
            "eval_every=0", "quiet=true", *more]  # fmt: skip


@pytest.mark.slow
def test_two_processes_equal_one(rows: Path, encoder: str, decoder: str) -> None:
    jobs: list[list[str]] = []
    for name, (fields, one, two, text) in CASES.items():
        method = [] if any(f.startswith("method=") for f in fields) else [f"method={name}"]
        model = encoder if text else decoder
        run(load_config(None, words(rows, model, text, rows / "one" / name, *method, *fields, *one)))
        jobs.append(words(rows, model, text, rows / "two" / name, *method, *fields, *two))
    many(rows, jobs)
    for name in CASES:
        one, two = (json.loads((rows / n / name / "metrics.json").read_text()) for n in ("one", "two"))
        assert one["steps"] == two["steps"] == (2 if name == "patient" else 4), name
        assert one["score"] == two["score"]
        losses = [[p["loss"] for p in metrics["curve"] if p["loss"] is not None] for metrics in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), name
        assert far(rows / "one" / name / "adapter", rows / "two" / name / "adapter") < 1e-6, name
