"""`--calibrate` runs real steps: it says what they took, on what, and refuses what it cannot run."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import zoo
from peftree import registry
from peftree.cli import app
from peftree.errors import ConfigError
from peftree.plan import calibrate as module
from peftree.plan import plan, request
from peftree.plan.calibrate import STEPS, WARM_UP, calibrate
from peftree.plan.show import Shown


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {key: tmp_path_factory.mktemp(key) for key in ("llama", "bert_cls", "vit", "t5", "llava")}
    for key, folder in made.items():
        model: Any = zoo.build(key)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    return {key: str(folder) for key, folder in made.items()}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return what counts the optimizer's steps from now on: tensors with a gradient in each."""
    steps: list[int] = []
    real = torch.optim.Optimizer.__init__

    def hooked(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.register_step_pre_hook(
            lambda made, *_: steps.append(sum(p.grad is not None for g in made.param_groups for p in g["params"]))
        )

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", hooked)
    return steps


def test_twenty_steps_are_timed_after_two(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps, said = counted(monkeypatch), []
    asked = request(model=folders["llama"], batch_size=2, max_length=6, device="cpu")
    found = calibrate(asked, plan(asked), said.append)
    assert found.steps == STEPS == 20 and steps == [steps[0]] * (WARM_UP + STEPS) and steps[0] > 0
    assert 0 < found.low <= found.seconds <= found.high
    assert (found.device, found.threads) == ("cpu", torch.get_num_threads())
    assert f"20 real steps on cpu, {found.threads} threads" in found.line()
    assert said[-1] == "real step 22 of 22"


def test_the_command_gives_the_time_and_the_memory(folders: dict[str, str]) -> None:
    words = ["plan", folders["llama"], "method=dora", "batch_size=2", "max_length=6", "--calibrate"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "s per step (" in result.stdout and "expected" in result.stdout
    said = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert said["time"]["steps"] == 20 and said["time"]["seconds"] > 0 and said["low"] > 0


FEW = ("lora", "full", "prefix_tuning", "lst", "galore")
UNFIT = ("bitfit", "conv_adapter", "convpass", "s_bitfit", "vpt", "xattn_tuning")


@pytest.mark.parametrize(
    ("key", "fields"),
    [
        *(("llama", {"method": {"name": name, **registry.get(name).tags.small}}) for name in FEW),
        *(
            pytest.param("llama", {"method": {"name": name, **registry.get(name).tags.small}}, marks=pytest.mark.slow)
            for name in sorted(registry.methods().keys() - {*FEW, *UNFIT})[::4]  # each is planned by the ledger's tests
        ),
        ("vit", {"method": "vpt"}),
        ("bert_cls", {"method": "bitfit"}),
        ("bert_cls", {"method": "s_bitfit"}),
        ("t5", {}),
        ("llava", {"max_length": 24}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"accumulation": 3}),
        ("llama", {"dtype": "bfloat16"}),
        *[("llama", {"optimizer": name}) for name in ("adamw_torch", "adamw_8bit", "adafactor", "sgd")],
        ("llama", {"precision": "bf16"}),
        ("llama", {"peft": {"peft_type": "LORA", "target_modules": ["q_proj"]}}),
        ("llama", {"peft": {"peft_type": "LORA", "target_modules": ["q_proj"]}, "code": "peftree"}),
    ],
)
def test_what_can_be_planned_can_be_timed(
    folders: dict[str, str], key: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "WARM_UP", 0)
    asked = request(**{"model": folders[key], "batch_size": 2, "max_length": 6, "device": "cpu", **fields})
    planned = plan(asked)  # which takes a step of a method's own optimizer, to see its state
    steps = counted(monkeypatch)
    assert calibrate(asked, planned).seconds > 0
    assert len(steps) == 2 and steps[0] > 0


def test_the_batches_of_a_step_are_all_run(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    ready = module._ready

    def seen(*args: Any) -> Any:
        run, optimizer = ready(*args)
        return lambda: (runs.append(1), run())[1], optimizer

    monkeypatch.setattr(module, "_ready", seen)
    asked = request(model=folders["llama"], batch_size=1, max_length=4, accumulation=3, device="cpu")
    calibrate(asked, plan(asked))
    assert len(runs) == 3 * (WARM_UP + STEPS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "eval"}, "Only a training step"),
        ({"quantize": "nf4"}, "Only a training step"),
        ({"devices": 2, "shard": "ddp"}, "Only a training step"),
        ({"optimizer": "lomo"}, "optimizer=lomo cannot be used"),
    ],
)
def test_what_cannot_be_run_is_refused(folders: dict[str, str], fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Shown.of(request(model=folders["llama"], max_length=6, **fields), timed=True)


def test_what_does_not_fit_here_is_not_run(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 10)
    monkeypatch.setattr(module, "_ready", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ConfigError, match="GiB are free here"):
        Shown.of(request(model=folders["llama"], max_length=6), timed=True)
