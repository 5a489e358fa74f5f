"""Training by two processes equals training by one with the same rows in each step, stops as one, and resumes."""

from __future__ import annotations

import json
import os
import re
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
from peftree.train.streams import Streams
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
    "adalora": (
        ["method.warmup=0.25", "method.final=0.25", "method.interval=1"],
        ["batch_size=8"],
        ["batch_size=4"],
        True,
    ),
    "adamix": ([LEVEL], ["batch_size=8"], ["batch_size=4"], True),
    "dylora": ([], ["batch_size=4", "accumulation=2"], ["batch_size=4"], True),
    "molora": ([], ["batch_size=4", "accumulation=2"], ["batch_size=4"], True),
    "fishmask": ([], ["batch_size=4", "accumulation=2"], ["batch_size=4"], True),
    "spiel": (["method.share=0.05", "method.period=3", "method.window=1"], ["batch_size=8"], ["batch_size=4"], True),
    "accumulated": (["method=lora"], ["batch_size=2", "accumulation=4"], ["batch_size=2", "accumulation=2"], False),
    "recomputed": (["method=adamix", LEVEL, "gradient_checkpointing=true"], ["batch_size=8"], ["batch_size=4"], True),
    "rounded": (["method=lora", "precision=bf16"], ["batch_size=4", "accumulation=2"], ["batch_size=4"], False),
    "packed": (
        ["method=lora", "packing=true", "max_length=16", "steps=4"],
        ["batch_size=1", "accumulation=2"],
        ["batch_size=1"],
        False,
    ),
    "grouped": (
        ["method=lora", "group_by_length=true", "workers=1"],
        ["batch_size=2", "accumulation=4"],
        ["batch_size=2", "accumulation=2"],
        True,
    ),
    "alone": (["method=lora"], ["batch_size=28"], ["batch_size=28"], True),
    "patient": (
        ["method=lora", "early_stopping=1", "eval_every=1", "lr=1e-9"],
        ["batch_size=8"],
        ["batch_size=4"],
        True,
    ),
}


def started(*command: str, patience: int = 1, **variables: str) -> subprocess.Popen[str]:
    """Start torchrun's two processes of a Python command line; it leaves a survivor seconds to say what it lost."""
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--monitor-interval", str(patience)]
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


def many(folder: Path, jobs: list[list[str]], code: int | None = 0, **variables: Any) -> str:
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
        assert one["steps"] == two["steps"] == {"patient": 2, "alone": 1}.get(name, 4), name
        assert one["score"] == pytest.approx(two["score"], rel=1e-6)
        losses = [[p["loss"] for p in metrics["curve"] if p["loss"] is not None] for metrics in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), name
        assert far(rows / "one" / name / "adapter", rows / "two" / name / "adapter") < 1e-6, name


@pytest.mark.slow
def test_one_then_two_then_one(rows: Path, encoder: str) -> None:
    """A run that is stopped and continued by another number of processes ends as one that was not."""
    whole = words(rows, encoder, True, rows / "whole", "method=adalora", "epochs=2", "batch_size=4")
    run(load_config(None, [*whole, "accumulation=2"]))
    parts = [f"output={rows / 'parts'}", "resume=true"]
    (rows / "first.json").write_text(json.dumps([[*whole, *parts, "accumulation=2"]]))
    alone = [sys.executable, str(HERE / "several.py"), str(rows / "first.json")]
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    first = subprocess.run(alone, env=os.environ | {"PEFTREE_TEST": "2:0:SIGTERM", "PYTHONPATH": path})
    assert first.returncode == 143
    many(rows, [[*whole, *parts]], code=1, PEFTREE_TEST="4:1:SIGTERM")
    assert [p.name for p in sorted((rows / "parts").glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-5"]
    run(load_config(None, [*whole, *parts, "accumulation=2"]))
    assert json.loads((rows / "parts" / "metrics.json").read_text())["steps"] == 8
    assert far(rows / "whole" / "adapter", rows / "parts" / "adapter") < 1e-6


@pytest.mark.slow
def test_all_stop_for_a_signal_to_one_and_resuming_is_exact(rows: Path, encoder: str) -> None:
    """Dropout included: each process continues its own stream, and the shared one continues as well."""
    job = [*words(rows, encoder, True, rows / "out", "method=adamix", "epochs=2", "quiet=false", "batch_size=4")]
    job = [w for w in job if w not in STILL]
    many(rows, [[*job, f"output={rows / 'whole'}"]])
    said = many(rows, [job], code=1, PEFTREE_TEST="3:1:SIGTERM")
    assert said.count("stopped by SIGTERM at step 4; resume continues from there") == 1, said
    assert [p.name for p in (rows / "out").glob("checkpoint-*")] == ["checkpoint-4"]
    assert damage(rows / "out" / "checkpoint-4") == ""
    streams = load_file(rows / "out" / "checkpoint-4" / "training.safetensors")
    names = ("random/process00000", "random/process00001", "random/shared")
    assert len({streams[name].numpy().tobytes() for name in names}) == 3
    said = many(rows, [[*job, "resume=true"]])
    assert "2 processes hold the same adapter before the first step" in said
    assert "2 processes hold the same adapter after the last step" in said
    one, two = (load_file(rows / n / "adapter" / "adapter.safetensors") for n in ("whole", "out"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_leaves_a_checkpoint(rows: Path, encoder: str) -> None:
    job = words(rows, encoder, True, rows / "out", "method=lora", "save_every=2", "batch_size=4")
    said = many(rows, [job], code=1, PEFTREE_TEST="3:1:SIGKILL", patience=5)
    assert "Another process of this run ended" in said
    assert [p.name for p in (rows / "out").iterdir() if p.is_dir()] == ["checkpoint-2"]
    run(load_config(None, [w for w in job if w != "batch_size=4"] + ["batch_size=8", "resume=true"]))
    run(load_config(None, [*words(rows, encoder, True, rows / "whole", "method=lora", "batch_size=8")]))
    assert far(rows / "whole" / "adapter", rows / "out" / "adapter") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "error", "steps"),
    [("3:1:nan", "The loss of step 4 is not finite", ["checkpoint-3"]),
     ("3:1:drift", "The adapters of the 2 processes differ after the last step, such as in ", ["checkpoint-4"])],
)  # fmt: skip
def test_what_one_process_meets_all_raise(rows: Path, encoder: str, what: str, error: str, steps: list[str]) -> None:
    job = words(rows, encoder, True, rows / "out", "method=lora", "save_every=1", "keep=1", "batch_size=4")
    said = many(rows, [job], code=1, PEFTREE_TEST=what, patience=5)
    assert said.count(f"Error: {error}") == 2, said
    assert [p.name for p in (rows / "out").glob("checkpoint-*")] == steps
    assert not (rows / "out" / "adapter").exists()


@pytest.mark.slow
def test_the_command_starts_processes_and_ends_as_they_do(rows: Path, encoder: str) -> None:
    more = ["method=lora", "save_every=1", "batch_size=4", "epochs=1000", "processes=2", "quiet=false"]
    command = [sys.executable, "-m", "peftree", "train"]
    process = subprocess.Popen(
        [*command, *words(rows, encoder, True, rows / "out", *more)], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 120
    while not list((rows / "out").glob("checkpoint-*")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in finished(process, 143)
    assert all(damage(p) == "" for p in (rows / "out").glob("checkpoint-*"))
    wrong = subprocess.run([*command, *words(rows, encoder, True, rows / "out", *more, "epochs=1")],
                           capture_output=True, text=True)  # fmt: skip
    assert wrong.returncode == 2 and "already holds a run" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_the_pages_job_of_submitit(rows: Path, encoder: str) -> None:
    """The page's file, run on this machine in place of a cluster."""
    page = (HERE.parents[1] / "docs" / "scale.md").read_text()
    code = next(block for block in re.findall(r"```py\n(.*?)```", page, re.S) if "submitit" in block)
    (rows / "job.py").write_text(code.replace('AutoExecutor("jobs")', 'AutoExecutor("jobs", cluster="local")'))
    config = load_config(None, words(rows, encoder, True, rows / "two", "method=lora", "batch_size=4"))
    (rows / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    ran = subprocess.run([sys.executable, "job.py"], cwd=rows, capture_output=True, text=True, check=True)
    one: Any = run(load_config(None, words(rows, encoder, True, rows / "one", "method=lora", "batch_size=8")))
    assert ran.stdout.strip() == f"[{one.score}, {one.score}]"
    assert far(rows / "one" / "adapter", rows / "two" / "adapter") < 1e-6


def test_every_row_has_weight_once() -> None:
    """Each process's batches are as many; one that none is left for reads another's again, without weight."""
    plain = BatchSampler(RandomSampler(range(26), generator=torch.Generator().manual_seed(3)), 4, False)
    whole = list(BatchSampler(RandomSampler(range(26), generator=torch.Generator().manual_seed(3)), 4, False))
    for size in (1, 2, 3, 5):
        parts = []
        for rank in range(size):
            plain.sampler.generator.manual_seed(3)
            parts.append(list(Part(plain, Team(rank, size))))
            assert len(parts[-1]) == len(Part(plain, Team(rank, size))) == -(-7 // size)
        for step, batches in enumerate(zip(*parts, strict=True)):
            assert [b for b in batches if not isinstance(b, Again)] == whole[step * size : (step + 1) * size]
            assert all(b == batches[0] for b in batches if isinstance(b, Again))
    assert items(Weightless(labels=torch.ones(3, dtype=torch.int64)), nn.Linear(1, 1)) == 0


class Alike(Team):
    """Two processes that hold the same, seen by one of them."""

    def gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        return [own, own]


def test_each_process_has_its_own_stream_and_all_share_one() -> None:
    """The shared one continues where that of one process was; a checkpoint keeps where it is."""
    found = []
    with torch.random.fork_rng(devices=[]):
        for rank in (0, 1):
            torch.manual_seed(5)
            streams = Streams(Alike(rank, 2), 7)
            streams.begin(0, {})
            own, saved = torch.rand(3), streams.states()
            with streams.alike():
                found.append((own, torch.rand(3), torch.rand(3)))
            streams.begin(1, {"random/shared": saved["random/shared"]})
            with streams.alike():
                assert torch.equal(torch.rand(3), found[-1][1])
        torch.manual_seed(5)
        one = torch.rand(3), torch.rand(3)
    assert not torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], one[0])
    assert all(torch.equal(a, b) for rank in found for a, b in zip(rank[1:], one, strict=True))


def test_processes_that_nobody_joined_are_refused(rows: Path, encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded, whoever started them."""
    job = words(rows, "no-such-model", True, rows / "out")
    with pytest.raises(ConfigError, match=r"processes=2, but this is one of 1\. Start it with peftree train"):
        run(load_config(None, [*job, "processes=2"]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2: 2 processes were started, but RANK.* is not set"):
        run(load_config(None, job))
    with pytest.raises(ConfigError, match="processes=3, but this is one of 2"):
        run(load_config(None, [*job, "processes=3"]))
    with pytest.raises(TrainError, match=r"several processes were started, but they did not join.*use_cpu=True"):
        team()
    assert not (rows / "out").exists()
    for size in ("", "0", "1", "none"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert join(load_config(None, job)) == team() == Team()


def test_the_rows_of_a_step_stay(rows: Path, encoder: str) -> None:
    """A resumed run may divide the rows of a step otherwise, not change their number."""
    job = words(rows, encoder, True, rows / "out", "method=lora", "resume=true", "steps=2")
    run(load_config(None, [*job, "batch_size=8", "save_every=1"]))
    with pytest.raises(ConfigError, match="batch_size x accumulation x processes was 8"):
        run(load_config(None, [*job, "batch_size=4"]))
    again: Any = run(load_config(None, [*job, "batch_size=4", "accumulation=2", "steps=3"]))
    assert again.steps == 3


def test_a_setting_that_an_old_run_lacks_had_its_default(rows: Path, encoder: str) -> None:
    """A run that an earlier version began can be continued, with what it did without saying so."""
    job = words(rows, encoder, True, rows / "out", "method=lora", "resume=true", "steps=1", "save_every=1")
    run(load_config(None, job))
    file = rows / "out" / "resolved.yaml"
    old = [line for line in file.read_text().splitlines() if line.partition(":")[0] not in ("precision", "processes")]
    file.write_text("\n".join(old) + "\n")
    with pytest.raises(ConfigError, match=r"other settings: precision\."):
        run(load_config(None, [*job, "precision=bf16", "steps=2"]))
    again: Any = run(load_config(None, [*job, "steps=2"]))
    assert again.steps == 2


def test_the_steps_of_a_run_are_those_of_all_processes(rows: Path, encoder: str) -> None:
    """What is finished, and how often the loss is noted, is known before the rows are read."""
    job = words(rows, encoder, True, rows / "out", "method=lora", "batch_size=4", "epochs=2")
    steps = {n: load_config(None, [*job, f"processes={n}"]).total_steps(28) for n in (1, 2, 3, 7, 9)}
    assert steps == {1: 14, 2: 8, 3: 6, 7: 2, 9: 2}


def test_a_plan_has_a_runs_processes(tmp_path: Path) -> None:
    from peftree.plan.question import request

    given: dict[str, Any] = {"model": str(tmp_path), "method": "lora"}
    assert (request(**given, processes=4).devices, request(**given, processes=4).shard) == (4, "ddp")
    assert request(**given, processes=4, shard="fsdp").shard == "fsdp"
    assert request(**given, processes=4, shard="none").shard == "ddp"  # as a run's resolved settings have it
    assert (request(**given, processes=1).devices, request(**given).shard) == (1, "none")
