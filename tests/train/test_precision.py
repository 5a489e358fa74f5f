"""Runs in bf16 and fp16: beside plain torch with Hugging Face PEFT, loss scaling, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peftree
from peftree.data.rows import load_data
from peftree.errors import ConfigError, DivergedError
from peftree.precision import check_precision
from peftree.settings import load_config
from peftree.store.tensors import pack
from peftree.tasks import build_task
from peftree.train import checkpoint
from peftree.train.run import run
from peftree.train.trainer import AdapterTrainer
from train.tiny import Break, trainer

STEPS = 6
RATE = 2e-2


class Watched(AdapterTrainer):
    """Keeps the batches and losses of its steps."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        self.batches = [*vars(self).get("batches", []), {n: v for n, v in inputs.items() if isinstance(v, Tensor)}]
        loss = super().compute_loss(model, inputs, *args, **more)
        self.seen = [*vars(self).get("seen", []), float(loss.detach())]
        return loss


def rows(n: int = 32) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 60, (n, 12), generator=torch.Generator().manual_seed(3)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


def trained(model: str, output: Path, chunked: bool = False, **settings: Any) -> tuple[Watched, Path]:
    """Train LoRA with plain AdamW; return the trainer and the files of its start, for PEFT."""
    base = tf.LlamaForCausalLM.from_pretrained(model)
    adapter = peftree.adapt(base, "lora", r=4, sites="linear", seed=1)
    start = peftree.save(adapter, output / "start", format="peft")
    args = tf.TrainingArguments(
        str(output / "run"), max_steps=STEPS, per_device_train_batch_size=8, report_to="none", disable_tqdm=True,
        save_strategy="no", lr_scheduler_type="constant", max_grad_norm=1e9, learning_rate=RATE, use_cpu=True,
        **settings,
    )  # fmt: skip
    more = {"train_dataset": rows(), "data_collator": collate, "chunked_loss": chunked}
    made = Watched(adapter, args, quiet=True, **more)
    made.train()
    return made, start


def by_hand(model: str, start: Path, batches: list[Any], dtype: torch.dtype | None) -> tuple[list[float], list[Tensor]]:
    """Train Hugging Face PEFT's LoRA from the same values, in a plain loop under torch's autocast."""
    base = tf.LlamaForCausalLM.from_pretrained(model)
    net = peft.PeftModel.from_pretrained(base, str(start), is_trainable=True).train()
    own = [p for p in net.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(own, lr=RATE, weight_decay=0.0), []
    for batch in batches:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = net(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found, own


def far(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT reads the old name
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_lora_is_peft_under_autocast(kind: str, decoder: str, tmp_path: Path) -> None:
    """Alike but for rounding: of sums in another order, and of inputs rebuilt in float32 where PEFT keeps bf16."""
    made, start = trained(decoder, tmp_path, **{kind: True})
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    half, _ = by_hand(decoder, start, made.batches, dtype)
    full, _ = by_hand(decoder, start, made.batches, None)
    assert made.seen[0] == half[0] != full[0], "until a first step moves it, a LoRA adds nothing"
    assert far(made.seen, half) < (4e-3 if kind == "bf16" else 1e-3) and made.seen[-1] < made.seen[0] - 0.01
    assert {p.dtype for p in made.adapter.parameters()} == {torch.float32}
    assert "forward" not in vars(made._base), "nothing of the run stays on the model"
    (tmp_path / "chunked").mkdir()
    made, _ = trained(decoder, tmp_path / "chunked", True, **{kind: True})
    assert made.seen[0] == pytest.approx(half[0], rel=1e-6)
    assert far(made.seen, half) < 0.02, "gradients of single tokens are rounded otherwise, no worse"


class Overflow(tf.TrainerCallback):
    """Makes the gradients of the second step too large for fp16, and keeps what a method would see."""

    def __init__(self, trainer: AdapterTrainer, step: int = 1) -> None:
        self.trainer, self.step = trainer, step
        self.seen: list[float] = []
        self.before: list[Tensor] = []
        self.moved: list[bool] = []
        self.scales: list[float] = []

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trainer.adapter.parameters()]

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.before = self.values()
        if state.global_step in (self.step, self.step + 1):
            self.trainer.accelerator.scaler._scale.fill_(1e38 if state.global_step == self.step else 1024.0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        grads = [p.grad for p in self.trainer.adapter.parameters() if p.grad is not None]
        self.seen.append(max(float(g.abs().max()) for g in grads))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.scales.append(self.trainer.accelerator.scaler.get_scale())
        self.moved.append(any(not torch.equal(a, b) for a, b in zip(self.before, self.values(), strict=True)))


def fp16(encoder: str, data: Path, output: Path, **more: Any) -> AdapterTrainer:
    task = build_task(encoder, load_data(data))
    adapter = peftree.adapt(task.model, "lora")
    made = trainer(adapter, task, data, output, fp16=True, use_cpu=True, quiet=True, **more)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return made


def test_a_step_that_overflows_is_dropped(encoder: str, review_data: Path, tmp_path: Path) -> None:
    made = fp16(encoder, review_data, tmp_path)
    watch = Overflow(made)
    made.add_callback(watch)
    made.train()
    assert watch.seen[1] == 0 and all(0 < g < 1e3 for g in (watch.seen[0], *watch.seen[2:])), "hooks see no infinity"
    assert watch.moved == [True, False, True, True]
    assert watch.scales == pytest.approx([1024, 5e37, 1024, 1024], rel=1e-3)


def test_a_gradient_that_overflows_by_itself_stops_the_run(encoder: str, review_data: Path, tmp_path: Path) -> None:
    made = fp16(encoder, review_data, tmp_path)
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    made.adapter.parameters()[0].register_hook(lambda g: g * float("inf"))
    with pytest.raises(DivergedError, match="The gradient of step 1 is not finite"):
        made.train()


def test_the_loss_scale_comes_back(encoder: str, review_data: Path, tmp_path: Path) -> None:
    saves: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "steps": 6}
    whole = fp16(encoder, review_data, tmp_path / "whole", **saves)
    whole.add_callback(Overflow(whole))
    whole.train()
    broken = fp16(encoder, review_data, tmp_path / "broken", callbacks=[Break(5)], **saves)
    broken.add_callback(Overflow(broken))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = fp16(encoder, review_data, tmp_path / "broken", **saves)
    again.train(resume_from_checkpoint=True)
    assert again.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    one, two = whole.adapter.state(), again.adapter.state()
    assert all(torch.equal(one[k], two[k]) for k in one)


class Waits(TorchDispatchMode):
    """Counts how often a program asks for the value of a tensor, for which it would wait on a GPU.

    What transformers' own forward asks, to leave out a mask that hides nothing, does not count.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.inside = False
        model.register_forward_pre_hook(lambda *seen: setattr(self, "inside", True))
        model.register_forward_hook(lambda *seen: setattr(self, "inside", False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default and not self.inside
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("passes", [1, 3])
def test_a_step_waits_once_for_the_device(passes: int, decoder: str, prompt_data: Path, tmp_path: Path) -> None:
    """After the first steps, of which more is checked; counting labels happens on the host, as rows are collated."""
    task = build_task(decoder, load_data(prompt_data))
    adapter = peftree.adapt(task.model, "lora")
    found: list[int] = []

    class Count(tf.TrainerCallback):
        waits = Waits(task.model)

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.waits = Waits(task.model)
            self.waits.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.waits.__exit__(None, None, None)
            found.append(self.waits.count)

    trainer(
        adapter, task, prompt_data, tmp_path, steps=8, batch=4, quiet=True, callbacks=[Count()], logging_steps=100,
        gradient_accumulation_steps=passes,
    ).train()  # fmt: skip
    assert found[4:7] == [1, 1, 1]


def test_what_a_device_lacks_is_refused_before_a_model_is_loaded(
    review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    config = load_config(None, ["model=none", f"data={review_data}", f"output={tmp_path / 'o'}", "precision=fp16"])
    with pytest.raises(ConfigError, match=r"'precision=fp16': precision=fp16: this processor .* Set precision=bf16"):
        run(config)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match=r"Tesla T4 has no bf16 arithmetic\. Set precision=fp16"):
        check_precision("bf16", torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="'float32', 'bf16' or 'fp16'"):
        load_config(None, ["model=m", "data=d", "precision=half"])


def test_a_run_in_bf16(encoder: str, review_data: Path, tmp_path: Path) -> None:
    """It learns, keeps less for the backward pass if the base is bfloat16 too, and resumes in bf16 only."""
    found = {}
    for kind, dtype in (("float32", "float32"), ("bf16", "bfloat16")):
        words = [
            "batch_size=8",
            "epochs=5",
            "lr=0.01",
            "threads=1",
            "quiet=true",
            f"dtype={dtype}",
            f"data={review_data}",
        ]
        common = [f"model={encoder}", f"output={tmp_path / kind}", *words]
        found[kind] = run(load_config(None, [*common, f"precision={kind}"]))
    assert found["bf16"].score >= 0.8
    assert found["bf16"].saved_for_backward_bytes < 0.8 * found["float32"].saved_for_backward_bytes
    with pytest.raises(ConfigError, match="other settings: precision"):
        run(load_config(None, [*common, "precision=float32", "resume=true"]))


def test_random_states_of_more_devices_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of four GPUs is resumed on a machine with two, and on one without any."""
    states = {f"random/cuda{i:03}": torch.full((16,), i, dtype=torch.uint8) for i in range(4)}
    tensors: dict[str, Tensor] = {}
    plain = {"random": checkpoint._random_state(tensors)}
    (tmp_path / checkpoint.STATE).write_text(json.dumps(plain))
    (tmp_path / checkpoint.TENSORS).write_bytes(pack(tensors | states))
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: given.append((index, int(state[0]))))
    for count in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", count.__int__)
        checkpoint.fill_random(tmp_path)
    assert given == [(0, 0), (1, 1)]
