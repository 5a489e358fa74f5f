"""Whole runs on a GPU: each precision, optimizers, compiling, resuming, a plan beside the device's own peak, nf4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import peftree
import zoo
from peftree.adapter import Adapter
from peftree.evaluate.cost import held_peak
from peftree.optimizers import check_optimizer
from peftree.plan import plan, request
from peftree.precision import autocast
from peftree.settings import RunConfig
from peftree.train.trainer import AdapterTrainer

STEPS = 8
LLAMA = zoo.LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def rows(n: int = 32) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 60, (n, 12), generator=torch.Generator().manual_seed(3)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


class Seen(tf.TrainerCallback):
    """Keeps the losses of steps, and stops as a killed process does."""

    def __init__(self, stop: int = 0) -> None:
        self.losses: list[float] = []
        self.stop = stop

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def trained(
    device: torch.device,
    output: Path,
    seen: Seen,
    compiles: bool = False,
    resume: bool = False,
    layers_again: bool = False,
    **settings: Any,
) -> AdapterTrainer:
    torch.manual_seed(0)
    adapter: Adapter = peftree.adapt(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), "lora", sites="linear", dropout=0.1)
    if layers_again:
        adapter.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[union-attr,operator]
    torch.manual_seed(99 if resume else 0)
    args = tf.TrainingArguments(
        str(output),
        max_steps=STEPS, per_device_train_batch_size=8, report_to="none", disable_tqdm=True, logging_steps=1,
        use_cpu=device.type == "cpu", save_strategy="steps", save_steps=3, learning_rate=2e-2, **settings,
    )  # fmt: skip
    made = AdapterTrainer(
        adapter, args, quiet=True, train_dataset=rows(), data_collator=collate, callbacks=[seen], compiles=compiles
    )
    if settings.get("fp16"):
        made.accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
    try:
        made.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        assert seen.stop
    return made


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"fp16": True}, {"layers_again": True}])
def test_it_learns_as_on_a_cpu(settings: dict[str, Any], device: torch.device, tmp_path: Path) -> None:
    here, there = Seen(), Seen()
    trained(torch.device("cpu"), tmp_path / "cpu", here, **settings)
    made = trained(device, tmp_path / "there", there, **settings)
    assert {p.dtype for p in made.adapter.parameters()} == {torch.float32}
    assert {p.device.type for p in made.adapter.parameters()} == {device.type}
    assert here.losses[0] == pytest.approx(there.losses[0], abs=5e-2)  # other numbers for dropout
    assert there.losses[-1] < there.losses[0] - 0.02


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor"])
def test_optimizers(name: str, device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu" and name.startswith("paged_"):
        pytest.skip("pages move between a GPU and memory")
    check_optimizer(name, device)
    seen = Seen()
    trained(device, tmp_path, seen, optim=name)
    assert seen.losses[-1] < seen.losses[0]


@pytest.mark.parametrize("settings", [{}, {"fp16": True}, {"optim": "adamw_8bit"}])
def test_a_resumed_run_ends_as_a_whole_one(settings: dict[str, Any], device: torch.device, tmp_path: Path) -> None:
    """With dropout: the device's own random numbers come back too."""
    whole = trained(device, tmp_path / "whole", Seen(), **settings)
    trained(device, tmp_path / "broken", Seen(stop=5), **settings)
    again = trained(device, tmp_path / "broken", Seen(), resume=True, **settings)
    one, two = whole.adapter.state(), again.adapter.state()
    assert all((one[k] - two[k]).abs().max() < 1e-5 for k in one)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
def test_it_compiles(device: torch.device, tmp_path: Path) -> None:
    if device.type == "cpu":
        pytest.skip("train/test_compile.py compiles for a CPU")
    torch._dynamo.reset()
    plain, fast = Seen(), Seen()
    for name, seen in (("plain", plain), ("fast", fast)):
        trained(device, tmp_path / name, seen, compiles=seen is fast)
    assert fast.losses[0] == pytest.approx(plain.losses[0], abs=5e-2) and fast.losses[-1] < fast.losses[0] - 0.02


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_is_what_the_device_counts(precision: str, dtype: str, device: torch.device, tmp_path: Path) -> None:
    wide = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
    config = tf.LlamaConfig(**wide, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    model = tf.LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).to(device)
    adapter = peftree.adapt(model, "lora", sites="linear")
    model.train().config.use_cache = False
    ids = torch.full((4, 128), 3, device=device)

    def step() -> None:
        with autocast(device, precision):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    held = sum(
        t.untyped_storage().nbytes() for t in {id(p): p for p in (*model.parameters(), *model.buffers())}.values()
    )
    found = plan(
        request(
            model=str(tmp_path), method={"name": "lora", "sites": "linear"}, batch_size=4, eval_batch_size=1,
            max_length=128, padded=False, chunked_loss=False,
            dtype=dtype, precision=precision, device=device.type, optimizer="sgd",
        )
    )  # fmt: skip
    assert adapter.parameters() and found.low == pytest.approx(held + held_peak(step, device), rel=0.1)


@pytest.mark.skipif(
    "quantize" not in RunConfig.model_fields, reason="`peftree train` does not load quantised bases yet"
)
def test_a_base_in_nf4(device: torch.device, tmp_path: Path) -> None:
    from peftree.settings import load_config
    from peftree.train.run import run
    from train.tiny import reviews, save, tokenizer, write_csv

    model = save("BertModel", tf.BertConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4), tmp_path / "m", tokenizer())  # fmt: skip
    write_csv(tmp_path / "rows.csv", reviews(40))
    made = run(load_config(None, [f"model={model}", f"data={tmp_path / 'rows.csv'}", f"output={tmp_path / 'out'}",
               "quantize=nf4", "steps=4", "quiet=true"]))  # fmt: skip
    assert made.steps == 4 and made.score >= 0
