"""AdapterTrainer: what it adds to transformers' Trainer, and that it stops, saves and resumes as promised."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import peftree
from peftree.adapter import Adapter
from peftree.data.rows import load_data
from peftree.deltas import LowRank
from peftree.errors import PeftreeError, TrainError
from peftree.methods.contract import Deltas, Method, Moment, Place, Tags
from peftree.tasks import Task, build_task
from peftree.train.checkpoint import damage, newest_checkpoint
from sampled import quick
from train.tiny import Break, trainer, write_jsonl


class Probe(Method):
    """A low-rank method that notes what the hooks are given."""

    name: ClassVar[str] = "probe"
    tags: ClassVar[Tags] = Tags("reparameterized", "none", True, True, lr=3e-3, needs_data=True)
    calls: ClassVar[list[Any]] = []
    sites: str = "attn.q attn.v"

    def build(self, place: Place) -> LowRank:
        return LowRank(place, place.kaiming(2, place.site.in_features), place.zeros(2, place.site.out_features), 1.0)

    def init(self, deltas: Deltas, batches: Any) -> None:
        losses = [batch() for batch in batches]
        losses[0].backward()
        self.calls.append(("init", len(losses), [float(x.detach()) for x in losses]))

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        alive = any(p.grad is not None and bool(p.grad.any()) for d in deltas.values() for p in d.parameters())
        name = "start" if moment.start else "schedule"
        self.calls.append((name, moment.step, moment.total, alive, type(moment.optimizer).__name__))

    def before_step(self, deltas: Deltas, moment: Moment) -> None:
        grads = {n: p.grad for d in deltas.values() for n, p in d.named_parameters() if p.grad is not None}
        self.calls.append(("before", moment.step, bool(grads), type(moment.optimizer).__name__))
        for d in deltas.values():
            d.get_parameter("A").grad.zero_()  # type: ignore[union-attr] # so that the step leaves A as it is

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        assert moment.again is not None
        again = moment.again()
        self.calls.append(("aux", moment.step, torch.equal(again.logits, moment.outputs.logits)))
        return sum((p.square().sum() for d in deltas.values() for p in d.parameters()), torch.zeros(()))

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        named = [(n, p) for d in deltas.values() for n, p in d.named_parameters()]
        return [
            {"params": [p for n, p in named if n == "A"], "lr": lr},
            {"params": [p for n, p in named if n != "A"], "lr": 10 * lr},
        ]

    def post_hoc(self, deltas: Deltas) -> None:
        self.calls.append(("post_hoc",))


@pytest.fixture
def task(decoder: str, prompt_data: Path) -> Task:
    return build_task(decoder, load_data(prompt_data))


def test_every_hook_has_its_turn(task: Task, decoder: str, prompt_data: Path, tmp_path: Path) -> None:
    Probe.calls.clear()
    adapter = peftree.adapt(task.model, Probe())
    made = trainer(adapter, task, prompt_data, tmp_path, steps=3, batch=8)
    made.train()
    names = [call[0] for call in Probe.calls]
    assert names == ["init", "start", *["aux", "before", "schedule"] * 3, "post_hoc"]
    assert Probe.calls[0][1] == 5
    assert Probe.calls[1][1:3] == (0, 3)
    assert [c[1:] for c in Probe.calls if c[0] == "before"] == [(n, True, "AdamW") for n in (1, 2, 3)]
    assert [c[1:] for c in Probe.calls if c[0] == "schedule"] == [(n, 3, True, "AdamW") for n in (1, 2, 3)]
    fresh = peftree.adapt(build_task(decoder, load_data(prompt_data)).model, Probe())
    pairs = zip(adapter.deltas.values(), fresh.deltas.values(), strict=True)
    same = [[torch.equal(a.get_parameter(n), b.get_parameter(n)) for n in "AB"] for a, b in pairs]
    assert same == [[True, False]] * 4, "the step used the gradients that the hook left"
    assert all(c[2] for c in Probe.calls if c[0] == "aux")
    assert [g["initial_lr"] for g in made.optimizer.param_groups] == [3e-3, 3e-2]


def test_learning_rate(task: Task, prompt_data: Path, tmp_path: Path) -> None:
    adapter = peftree.adapt(task.model, "lora")
    plain = trainer(adapter, task, prompt_data, tmp_path)
    assert [g["lr"] for g in plain.create_optimizer().param_groups] == [5e-4]
    own = trainer(adapter, task, prompt_data, tmp_path, lr=0.02)
    assert [g["lr"] for g in own.create_optimizer().param_groups] == [0.02]
    args = trainer(adapter, task, prompt_data, tmp_path, learning_rate=0.03, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"]) for g in args.create_optimizer().param_groups] == [(0.03, 0.1)]


@pytest.mark.parametrize("kind", quick(["generation", "classification"]))
def test_accumulation_is_one_large_batch(
    kind: str, encoder: str, decoder: str, review_data: Path, prompt_data: Path, tmp_path: Path
) -> None:
    """Gradients of 4 x 4 rows are those of 16, the extra loss included, for either kind of loss."""
    gradients = []
    for batch, accumulation in ((16, 1), (4, 4)):
        source, folder = (decoder, prompt_data) if kind == "generation" else (encoder, review_data)
        made_task = build_task(source, load_data(folder))
        adapter = peftree.adapt(made_task.model, Aux(), head=False)
        made_task.model.eval()
        for module in made_task.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        made = trainer(
            adapter, made_task, folder, tmp_path / str(batch), steps=1, batch=batch,
            gradient_accumulation_steps=accumulation, max_grad_norm=0.0, callbacks=[keep := Keep(adapter)],
        )  # fmt: skip
        made.train()
        gradients.append(keep.gradients)
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-7)


class Aux(Probe):
    """The same with every tensor away from zero and no data needed."""

    name: ClassVar[str] = "aux"
    tags: ClassVar[Tags] = Tags("reparameterized", "none", False, True, lr=1e-3)

    def build(self, place: Place) -> LowRank:
        return LowRank(place, place.kaiming(2, place.site.in_features), place.normal(2, place.site.out_features), 1.0)


class Keep(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.gradients: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.gradients = [p.grad.clone() for p in self.adapter.parameters() if p.grad is not None]


def fresh(decoder: str, folder: Path, method: str = "lora", **fields: Any) -> tuple[Task, Adapter]:
    task = build_task(decoder, load_data(folder))
    return task, peftree.adapt(task.model, method, **fields)


@pytest.mark.parametrize("accumulation", quick([3, 1]))
def test_resuming_is_exact(decoder: str, prompt_data: Path, tmp_path: Path, accumulation: int) -> None:
    """Weights, optimizer, rate and losses of a run broken off and resumed are those of one that was not, to the bit."""
    settings: dict[str, Any] = {
        "steps": 12, "batch": 4, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": accumulation, "logging_steps": 1,
    }  # fmt: skip
    task, whole = fresh(decoder, prompt_data, dropout=0.2)
    one = trainer(whole, task, prompt_data, tmp_path / "whole", **settings)
    one.train()
    task, broken = fresh(decoder, prompt_data, dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        trainer(broken, task, prompt_data, tmp_path / "broken", callbacks=[Break(7)], **settings).train()
    assert newest_checkpoint(tmp_path / "broken", print) == tmp_path / "broken" / "checkpoint-4"
    random.seed(99)
    torch.manual_seed(99)
    task, again = fresh(decoder, prompt_data, dropout=0.2)
    two = trainer(again, task, prompt_data, tmp_path / "broken", **settings)
    two.train(resume_from_checkpoint=True)
    assert two.state.global_step == 12
    assert all(torch.equal(whole.state()[k], again.state()[k]) for k in whole.state())
    first, second = one.optimizer.state_dict()["state"], two.optimizer.state_dict()["state"]
    assert all(torch.equal(first[i][k], second[i][k]) for i in first for k in first[i])
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (one, two)]
    assert losses[0] == losses[1]
    assert one.lr_scheduler.state_dict() == two.lr_scheduler.state_dict()


@pytest.mark.parametrize(
    ("method", "every"),
    [("adalora", 3)]
    + [
        pytest.param(m, 3, marks=pytest.mark.slow)
        for m in ("adamix", "fishmask", "spiel", "pissa", "molora", "lora_plus", "galore", "id3", "ivon_lora")
    ]
    + [pytest.param(m, n, marks=pytest.mark.slow) for m, n in (("ist", 3), ("diff_pruning", 3), ("diff_pruning", 4))],
)
def test_resuming_is_exact_for_methods_with_a_state_of_their_own(
    method: str, every: int, encoder: str, review_data: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 7, "batch": 4, "save_strategy": "steps", "save_steps": every, "quiet": True}
    task, whole = fresh(encoder, review_data, method)
    trainer(whole, task, review_data, tmp_path / "whole", **settings).train()
    task, broken = fresh(encoder, review_data, method)
    with pytest.raises(KeyboardInterrupt):
        trainer(broken, task, review_data, tmp_path / "broken", callbacks=[Break(5)], **settings).train()
    torch.manual_seed(99)
    task, again = fresh(encoder, review_data, method)
    trainer(again, task, review_data, tmp_path / "broken", **settings).train(resume_from_checkpoint=True)
    assert all(torch.equal(whole.state()[k], again.state()[k]) for k in whole.state())


@pytest.fixture(scope="module")
def saved_once(decoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with checkpoints at steps 2, 4 and 6; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    write_jsonl(folder / "train.jsonl", [(f"the film w{i}", "good plot") for i in range(20)])
    task, adapter = fresh(decoder, folder, r=2)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "quiet": True}
    trainer(adapter, task, folder, folder / "out", steps=6, **settings).train()
    return folder / "out"


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(saved_once, tmp_path / "out"))


def test_a_checkpoint_is_an_adapter_and_nothing_of_the_base(saved: Path, decoder: str, prompt_data: Path) -> None:
    folder = saved / "checkpoint-6"
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "adapter.safetensors", "manifest.json", "training.safetensors", "training.json",
        "trainer_state.json", "checkpoint.json",
    }  # fmt: skip
    adapter = peftree.load(build_task(decoder, load_data(prompt_data)).model, folder)
    assert sum(p.numel() * 4 for p in adapter.parameters()) < 10_000
    assert sum(p.stat().st_size for p in folder.iterdir()) < 60_000


@pytest.mark.parametrize("name", ["adapter.safetensors", "training.safetensors", "training.json", "trainer_state.json"])
@pytest.mark.parametrize("injury", ["flip", "cut", "gone"])
def test_damaged_checkpoint_is_passed_over(saved: Path, name: str, injury: str) -> None:
    path = saved / "checkpoint-6" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if injury == "gone":
        path.unlink()
    else:
        path.write_bytes(data if injury == "flip" else data[:-1])
    said: list[str] = []
    assert newest_checkpoint(saved, said.append) == saved / "checkpoint-4"
    assert "checkpoint-6 is skipped" in said[0]
    assert name in said[0]


def test_resume_uses_the_previous_one_and_refuses_when_all_are_damaged(
    saved: Path, decoder: str, prompt_data: Path, capsys: Any
) -> None:
    (saved / "checkpoint-6" / "checkpoint.json").unlink()
    task, adapter = fresh(decoder, prompt_data, r=2)
    (saved / ".checkpoint-7.killed").mkdir()
    made = trainer(adapter, task, prompt_data, saved, steps=8)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 8
    assert not (saved / ".checkpoint-7.killed").exists()
    assert "checkpoint-6 is skipped" in capsys.readouterr().err
    for path in saved.glob("checkpoint-*/training.json"):
        path.write_text("{}")
    task, adapter = fresh(decoder, prompt_data, r=2)
    with pytest.raises(TrainError, match=r"All \d checkpoints in .* are damaged"):
        trainer(adapter, task, prompt_data, saved, steps=8).train(resume_from_checkpoint=True)


def test_13_resuming_a_finished_run_says_so(saved: Path, decoder: str, prompt_data: Path) -> None:
    task, adapter = fresh(decoder, prompt_data, r=2)
    with pytest.raises(TrainError, match=r"finished: step 6 of 6.*Raise epochs or steps"):
        trainer(adapter, task, prompt_data, saved, steps=6).train(resume_from_checkpoint=True)


def test_resuming_with_another_adapter_changes_nothing(saved: Path, decoder: str, prompt_data: Path) -> None:
    task, adapter = fresh(decoder, prompt_data, r=4)
    before = {k: t.clone() for k, t in adapter.state().items()}
    with pytest.raises(TrainError, match="belongs to another adapter"):
        trainer(adapter, task, prompt_data, saved, steps=8).train(resume_from_checkpoint=True)
    assert all(torch.equal(t, before[k]) for k, t in adapter.state().items())


def test_resuming_from_nothing_starts_at_step_one(decoder: str, prompt_data: Path, tmp_path: Path, capsys: Any) -> None:
    task, adapter = fresh(decoder, prompt_data)
    trainer(adapter, task, prompt_data, tmp_path, steps=3).train(resume_from_checkpoint=True)
    assert "starting at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["weight", "loss", "gradient"])
def test_not_finite_stops_within_a_step_and_saves_nothing(
    where: str, decoder: str, prompt_data: Path, tmp_path: Path
) -> None:
    task, adapter = fresh(decoder, prompt_data)
    callback = Poison(adapter, where, 5)
    made = trainer(
        adapter, task, prompt_data, tmp_path, steps=20, save_strategy="steps", save_steps=1, save_total_limit=2,
        callbacks=[callback],
    )  # fmt: skip
    with pytest.raises(TrainError, match=r"not finite.*nothing from this step was saved"):
        made.train()
    assert made.state.global_step <= 6
    kept = sorted(tmp_path.glob("checkpoint-*"))
    assert kept
    assert not [damage(p) for p in kept if damage(p)]
    for path in kept:  # the store refuses tensors that are not finite
        peftree.load(build_task(decoder, load_data(prompt_data)).model, path)


class Poison(TrainerCallback):
    """Puts a NaN into a weight (of the query projection, where attention hides it), a loss or a gradient."""

    def __init__(self, adapter: Adapter, where: str, step: int) -> None:
        self.adapter = adapter
        self.where = where
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if state.global_step != self.step:
            return
        query = self.adapter.parameters()[0]
        if self.where == "weight":
            query.data[0, 0] = float("nan")
        elif self.where == "gradient":
            query.register_hook(lambda grad: grad * float("inf"))
        else:
            model.lm_head.register_forward_hook(lambda *a: a[-1] * float("inf"))


def test_disk_full_keeps_the_previous_checkpoint(
    decoder: str, prompt_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftree.train import checkpoint

    real, calls = checkpoint.atomic_write, []

    def full(path: Path, data: Any) -> Path:
        calls.append(path)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(checkpoint, "atomic_write", full)
    task, adapter = fresh(decoder, prompt_data)
    with pytest.raises(PeftreeError, match=r"No space left.*Earlier checkpoints are complete"):
        trainer(adapter, task, prompt_data, tmp_path / "out", steps=6, save_strategy="steps", save_steps=2).train()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", "checkpoint-2"]
    assert damage(tmp_path / "out" / "checkpoint-2") == ""


class Terminate(TrainerCallback):
    """Sends a signal to this process in the middle of a step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_exits(
    name: str, code: int, decoder: str, prompt_data: Path, tmp_path: Path, capsys: Any
) -> None:
    task, adapter = fresh(decoder, prompt_data)
    with pytest.raises(SystemExit) as caught:
        trainer(adapter, task, prompt_data, tmp_path, steps=50, callbacks=[Terminate(signal.Signals[name])]).train()
    assert caught.value.code == code
    assert f"stopped by {name} at step 4" in capsys.readouterr().err
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert damage(tmp_path / "checkpoint-4") == ""


def test_handlers_of_signals_are_put_back(task: Task, prompt_data: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer(peftree.adapt(task.model, "lora"), task, prompt_data, tmp_path, steps=3).train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_old_checkpoints_are_removed(decoder: str, prompt_data: Path, tmp_path: Path) -> None:
    task, adapter = fresh(decoder, prompt_data)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer(adapter, task, prompt_data, tmp_path / "out", steps=5, **settings).train()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".lock", "checkpoint-4", "checkpoint-5"}


def test_state_file_is_plain(saved: Path) -> None:
    for path in saved.glob("checkpoint-6/*.json"):
        json.loads(path.read_text())
    assert not [p for p in saved.rglob("*") if p.suffix in (".bin", ".pt", ".pth")]
    assert shutil.disk_usage(saved).free > 0
    assert oct(os.stat(saved / "checkpoint-6").st_mode)[-3:] == "755"
