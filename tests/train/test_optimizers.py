"""Optimizers and schedules by name: every one that the Trainer knows is trained with or refused, groups are kept."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

import peftree
from peftree.data.rows import load_data
from peftree.errors import ConfigError
from peftree.optimizers import DEFAULT, check_optimizer, make_optimizer
from peftree.settings import load_config
from peftree.tasks import build_task
from peftree.train.run import run
from sampled import quick
from train.tiny import Break, trainer

CPU = torch.device("cpu")
NEED_MORE = (  # a score at each step, a lowest rate, or lengths of their phases
    *("reduce_lr_on_plateau", "greedy", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
    "constant_with_warmup",  # which is `constant` here
)
NAMES = [name.value for name in OptimizerNames]


def refusal(name: str, device: torch.device = CPU) -> str:
    try:
        check_optimizer(name, device)
    except ConfigError as error:
        return str(error)
    return ""


USABLE = [name for name in NAMES if not refusal(name)]


def words(encoder: str, data: Path, output: Path, *more: str) -> list[str]:
    usual = ["batch_size=8", "steps=6", "lr=0.01", "threads=1", "quiet=true", "base_score=false", "eval_every=0"]
    return [f"model={encoder}", f"data={data}", f"output={output}", *usual, *more]


def trained(encoder: str, data: Path, output: Path, name: str, method: str = "lora", **more: Any) -> Any:
    task = build_task(encoder, load_data(data))
    adapter = peftree.adapt(task.model, method, **({"r": 160} if method == "lora_plus" else {}))
    settings = {"steps": 6, "save_strategy": "steps", "save_steps": 3, "quiet": True, "max_grad_norm": 0.0}
    return trainer(adapter, task, data, output, optim=name, lr=1e-3, **settings | more)


@pytest.mark.parametrize("name", quick(sorted(USABLE, key=lambda name: name not in ("adamw_8bit", "adafactor")), 2))
def test_a_run_resumes_to_the_bit_with_every_optimizer(
    name: str, encoder: str, review_data: Path, tmp_path: Path
) -> None:
    """Tensors are large enough for 8-bit state; what a checkpoint keeps is all that the optimizer keeps."""
    whole = trained(encoder, review_data, tmp_path / "whole", name, "lora_plus")
    before = {k: v.clone() for k, v in whole.adapter.state().items()}
    whole.train()
    broken = trained(encoder, review_data, tmp_path / "broken", name, "lora_plus", callbacks=[Break(5)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = trained(encoder, review_data, tmp_path / "broken", name, "lora_plus")
    again.train(resume_from_checkpoint=True)
    one, two = whole.adapter.state(), again.adapter.state()
    assert all(torch.equal(one[k], two[k]) for k in one) and any(not torch.equal(one[k], before[k]) for k in one)


def test_groups_keep_their_rates_in_8_bits(encoder: str, review_data: Path, tmp_path: Path) -> None:
    """LoRA+ gives B a rate 16 times that of A; against bitsandbytes' own optimizer on the same gradients."""
    made = trained(encoder, review_data, tmp_path, "adamw_8bit", "lora_plus", lr_scheduler_type="constant")
    groups = made.adapter.param_groups(1e-3)
    assert len({g["lr"] for g in groups}) > 1
    held = [[p.detach().clone() for p in g["params"]] for g in groups]
    copies = [
        {"params": [torch.nn.Parameter(p) for p in ps], "lr": g["lr"]} for ps, g in zip(held, groups, strict=True)
    ]
    theirs = bnb.optim.AdamW8bit(copies, weight_decay=0.0)

    class Follow(Break):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            for group, copy in zip(groups, copies, strict=True):
                for p, q in zip(group["params"], copy["params"], strict=True):
                    q.grad = p.grad.clone()
            theirs.step()

    made.add_callback(Follow(-1))
    made.train()
    kept = made.plain_optimizer().state
    assert {t.dtype for state in kept.values() for t in state.values() if isinstance(t, torch.Tensor)} >= {torch.uint8}
    for group, copy in zip(groups, copies, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(group["params"], copy["params"], strict=True))


def test_every_other_name_is_refused_with_a_reason() -> None:
    said = {name: refusal(name) for name in NAMES if name not in USABLE}
    assert all(re.search(f"optimizer={name} .*(Use |method=galore)", text) for name, text in said.items())
    paged = {name for name in said if name.startswith("paged_")}
    assert not any(refusal(name, torch.device("cuda")) for name in paged) and len(paged) == 6
    assert "Use adamw_8bit." in said["paged_adamw_8bit"] and f"Use {DEFAULT}." in said["paged_ademamix_32bit"]
    assert len(USABLE) + len(said) == len(NAMES) and len(USABLE) >= 15


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["optimizer=adamw"], r"there is no optimizer 'adamw'\. .*adamw_torch_fused"),
        (["optimizer=adamw_8bits"], "Did you mean 'adamw_8bit'"),
        (["optimizer=galore_adamw"], r"cannot be used: .* method=galore trains with GaLore"),
        (["optimizer=lion_8bit", "method=galore"], r"galore has an optimizer of its own.* Leave the optimizer out"),
        (["optim=sgd"], "Write optimizer"),
    ],
)
def test_what_no_run_can_use_is_refused_before_a_model_is_loaded(
    more: list[str], said: str, review_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(load_config(None, words("none", review_data, tmp_path / "out", *more)))
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: found(name, *a) if name != "bitsandbytes" else None
    )
    config = load_config(None, words("none", review_data, tmp_path / "out", "optimizer=lion_8bit"))
    with pytest.raises(ConfigError, match=r"'optimizer=lion_8bit': .* needs bitsandbytes\. Run: pip install bitsandby"):
        run(config)
    with pytest.raises(ConfigError, match=r"no odd kernel\. Use adamw_torch"):
        check_optimizer(DEFAULT, type("Device", (), {"type": "odd"})())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [s.value for s in SchedulerType])
def test_every_schedule_of_the_trainer_runs_or_is_refused(
    name: str, encoder: str, review_data: Path, tmp_path: Path
) -> None:
    try:
        config = load_config(None, words(encoder, review_data, tmp_path / "out", f"schedule={name}"))
    except ConfigError as error:
        said = str(error)
    else:
        said = f"{run(config).steps} steps"
    assert said == "6 steps" or ("'linear'" in said and name in NEED_MORE)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_default_is_torchs_adamw(decay: float) -> None:
    """Twenty steps over tensors of many sizes, beside torch's AdamW without its fused kernel."""
    shapes = [(8, 576), (576, 8), (1,), (3, 5, 7), (192,)]
    sides = []
    for made in (
        lambda groups: make_optimizer(DEFAULT, groups, weight_decay=decay),
        lambda groups: torch.optim.AdamW(groups, weight_decay=decay, foreach=False, fused=False),
    ):
        draw = torch.Generator().manual_seed(0)
        tensors = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
        optimizer = made([{"params": tensors[:2], "lr": 1e-2}, {"params": tensors[2:], "lr": 1e-3}])
        assert bool(optimizer.defaults["fused"]) is (len(sides) == 0)
        for _ in range(20):
            for tensor in tensors:
                tensor.grad = torch.randn(tensor.shape, generator=draw)
            optimizer.step()
        sides.append(tensors)
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
