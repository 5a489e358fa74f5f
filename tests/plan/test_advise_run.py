"""Advice is for the run that is asked for: planned with its settings, which its run files keep; what it cannot keep."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import yaml
from typer.testing import CliRunner

from peftree.advise import advice as advising
from peftree.advise import cost as costs
from peftree.advise.advice import Asked, advise, look
from peftree.cli import app
from peftree.errors import ConfigError
from peftree.plan import Request
from peftree.settings import RunConfig, load_config
from plan.test_advise import invented
from train import tiny

RUN = {
    "config": {"num_hidden_layers": 1}, "accumulation": 2, "activations": "checkpoint", "head": False,
    "dtype": "auto", "batch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a classifier's config and tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("model")
    words = tiny.tokenizer()
    tf.BertConfig(vocab_size=len(words), max_position_embeddings=40, dtype="bfloat16", **tiny.SHAPE).save_pretrained(
        folder
    )
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of reviews."""
    return str(tiny.write_csv(tmp_path_factory.mktemp("data") / "train.csv", tiny.reviews(60)))


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the invented evidence is known."""
    monkeypatch.setattr(advising, "known", lambda: (invented(),))


@pytest.fixture
def file(model: str, data: str, tmp_path: Path) -> Path:
    """A run file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": data, **RUN}))
    return path


def test_candidates_are_planned_with_the_runs_settings_and_their_files_keep_them(file: Path, tmp_path: Path) -> None:
    words = ["advise", str(file), "memory=1GiB", "top=1", "--write", str(tmp_path / "runs"), "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    found = json.loads(done.stdout)
    planned = found["recommended"][0]["judged"]["cost"]["plan"]["request"]
    assert {k: planned[k] for k in RUN} == RUN
    assert sum(found["model"]["towers"].values()) < 20 and found["setting"]["dtype"] == "auto"
    run = load_config(found["written"][0])
    assert {k: getattr(run, k) for k in RUN} == RUN
    shown = CliRunner().invoke(app, [w for w in words if w != "--json"], catch_exceptions=False)
    assert "base in bfloat16, its own" in shown.stdout


def test_goal_and_budget_are_words_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Asked] = []

    def stop(asked: Asked, told: Any) -> None:
        seen.append(asked)
        raise ConfigError("stop")

    monkeypatch.setattr(advising, "advise", stop)
    for words in (["memory=2GB", "goal=speed"], ["--memory", "2GB", "--goal", "speed"], ["memory=2GB"]):
        CliRunner().invoke(app, ["advise", str(file), *words])
    file.write_text(file.read_text() + "goal: speed\nmemory: 2GB\n")
    CliRunner().invoke(app, ["advise", str(file)])
    CliRunner().invoke(app, ["advise", str(file), "--goal", "memory", "--memory", "3GB"])
    assert [(a.goal, a.memory) for a in seen] == [
        ("speed", 2 * 10**9), ("speed", 2 * 10**9), ("quality", 2 * 10**9), ("speed", 2 * 10**9), ("memory", 3 * 10**9),
    ]  # fmt: skip


def test_settings_that_no_run_file_says_are_refused(model: str, data: str, file: Path) -> None:
    for name in set(Request.model_fields) - set(RunConfig.model_fields) - {"memory", "device"}:
        value = Request.model_fields[name].get_default(call_default_factory=True)
        with pytest.raises(ConfigError, match=rf"{name}: .*advice cannot keep it"):
            look(Asked(model=model, data=data, memory=1 << 30, **{name: value}))
    file.write_text(file.read_text() + "new_tokens: 64\n")
    done = CliRunner().invoke(app, ["advise", str(file), "memory=1GB"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith(f"{file}:10: new_tokens: ") and "`peftree plan`" in done.exception.fix


def test_a_method_is_checked_and_left_open(model: str, data: str) -> None:
    words = ["advise", model, f"data={data}", "memory=1GB", "method=dora"]
    done = CliRunner().invoke(app, [*words, "rank=4"])
    assert str(done.exception).startswith("'rank=4': dora has no field 'rank'")
    found = advise(Asked(model=model, data=data, memory=1 << 30, top=1, method={"name": "dora", "r": 4}, lr=0.5))
    assert any("advice chooses the method" in note and "dora" in note for note in found.notes)
    assert found.recommended[0].judged.candidate.method == "houlsby" and found.recommended[0].run["lr"] < 0.5
    plain = advise(Asked(model=model, data=data, memory=1 << 30, top=1))
    assert not any("advice chooses the method" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("batch", "accumulation", "checkpointing", "fits", "wanted"),
    [
        (16, 2, False, (16, 2, False), (16, 2, False)),
        (16, 2, False, (4, 8, False), (4, 8, False)),
        (16, 2, False, (16, 2, True), (16, 2, True)),
        (16, 2, False, (1, 32, True), (1, 32, True)),
        (6, 3, False, (4, 5, False), (4, 5, False)),  # 18 rows a step
        (32, 2, True, (16, 4, True), (16, 4, True)),
        (8, 2, True, (4, 4, True), (4, 4, True)),
    ],
)
def test_fewer_rows_at_a_time_are_made_up_for(
    model: str, data: str, monkeypatch: pytest.MonkeyPatch, batch: int, accumulation: int, checkpointing: bool,
    fits: tuple[int, int, bool], wanted: tuple[int, int, bool],
) -> None:  # fmt: skip
    asked = Asked(
        model=model, data=data, memory=1 << 30, batch_size=batch, accumulation=accumulation,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    _, rows, how, _ = look(asked)
    request = costs.request(asked, rows, how, "lora", {})
    whole = costs.plan(request)
    taken = []

    def fake(r: Request) -> Any:
        taken.append((r.batch_size, r.accumulation, r.gradient_checkpointing))
        small = taken[-1] in (fits, (1, batch * accumulation, True))
        return dataclasses.replace(whole, request=r, expected=90 if small else 200)

    monkeypatch.setattr(costs, "plan", fake)
    found = costs.cost(request, 100)
    assert (found.batch, found.accumulation, found.checkpointing, found.fits) == (*wanted, True)
    assert len(taken) == len(set(taken)) and all(b * a >= batch * accumulation for b, a, _ in taken)
    assert not checkpointing or all(c for *_, c in taken)


def test_what_gradients_take_between_passes_is_counted(model: str, data: str) -> None:
    asked = Asked(model=model, data=data, memory=1 << 30, device="cpu")
    _, rows, how, _ = look(asked)
    request = costs.request(asked, rows, how, "full", {})
    whole = costs.plan(request)
    found = costs.cost(request, whole.expected - 1)
    assert found.accumulation > 1 and found.plan.request.accumulation == found.accumulation
    assert "first backward" in found.plan.phases
