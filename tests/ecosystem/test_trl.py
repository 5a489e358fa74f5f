"""Adapters under TRL's own trainers: supervised, preferences, and rewards on what the model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import peftree
from ecosystem.common import METHODS, Watched, examples, pairs, words
from peftree import registry
from peftree.errors import AdapterError, PeftreeError

pytestmark = [
    pytest.mark.slow,  # importing TRL takes seconds
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL uses names that transformers 6 will drop
]
ARGS: dict[str, Any] = {
    "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
    "logging_steps": 1, "max_steps": 12, "per_device_train_batch_size": 8,
}  # fmt: skip


def rows(listed: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(listed)


def adam(watched: Watched, lr: float = 1e-2) -> tuple[torch.optim.Optimizer, None]:
    return torch.optim.AdamW(watched.adapter.param_groups(lr)), None


def curve(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_supervised(method: str, checkpointing: bool, chat_model: str, tmp_path: Path, trl: Any) -> None:
    watched = Watched(chat_model, method)
    args = trl.SFTConfig(str(tmp_path / "out"), gradient_checkpointing=checkpointing, **ARGS)
    trainer = trl.SFTTrainer(
        watched.model, args, train_dataset=rows(examples()), processing_class=words(), optimizers=adam(watched)
    )
    trainer.train()
    losses = curve(trainer, "loss")
    assert mean(losses[-3:]) < losses[0]
    watched.check(tmp_path / "adapter")


def test_the_loss_is_that_of_a_plain_pass_whatever_the_method(chat_model: str, trl: Any) -> None:
    """TRL's head takes its weight for itself and runs only the stack, which does not see the labels."""
    from trl.trainer.utils import add_fused_lm_head

    text = words()(["w1 film was good", "w2 bad"], padding=True, return_tensors="pt")
    batch = {k: text[k] for k in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :1] = -100
    compared = 0
    for name in registry.methods():
        model: Any = tf.AutoModelForCausalLM.from_pretrained(chat_model)
        kind = registry.get(name)
        if kind.tags.needs_data:
            continue
        try:
            adapter = peftree.adapt(model, name, **kind.tags.small)
        except PeftreeError:
            continue
        for parameter in adapter.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        own, want = _graded(model, adapter, labels=labels, **batch)
        add_fused_lm_head(model)
        if name == "madx":  # its last adapter lies behind the head
            with pytest.raises(AdapterError, match=r"weight of lm_head outside that module's forward"):
                model(**batch, labels=labels, fused_lm_head=True)
            continue
        loss, gradients = _graded(model, adapter, labels=labels, fused_lm_head=True, **batch)
        assert loss == pytest.approx(own, abs=1e-5), name
        for one, other in zip(gradients, want, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
        compared += 1
    assert compared > 100


def _graded(model: Any, adapter: peftree.Adapter, **batch: Any) -> tuple[float, list[Tensor]]:
    torch.manual_seed(1)
    loss = model.train()(**batch).loss
    trained = [p for p in adapter.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return loss.item(), [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def test_an_adapter_on_the_head_trains(chat_model: str, tmp_path: Path, trl: Any) -> None:
    watched = Watched(chat_model, "lora", sites="lm_head *.q_proj")
    args = trl.SFTConfig(str(tmp_path / "out"), **ARGS)
    trainer = trl.SFTTrainer(
        watched.model, args, train_dataset=rows(examples()), processing_class=words(), optimizers=adam(watched)
    )
    trainer.train()
    watched.check(tmp_path / "adapter")


def test_supervised_goes_on_from_a_checkpoint(chat_model: str, tmp_path: Path, trl: Any) -> None:
    settings = ARGS | {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}

    def trained(resume: bool) -> Watched:
        watched = Watched(chat_model, "houlsby")
        args = trl.SFTConfig(str(tmp_path / "out"), **settings)
        trainer = trl.SFTTrainer(
            watched.model, args, train_dataset=rows(examples()), processing_class=words(), optimizers=adam(watched)
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4") if resume else None)
        return watched

    whole, again = trained(False), trained(True)
    assert torch.equal(whole.logits(), again.logits())


def scores(model: nn.Module, listed: list[dict[str, str]]) -> Tensor:
    """Return log-probabilities of both answers of each row, row by row, as the definition has them."""
    tokens, out = words(), []
    for row in listed:
        for which in ("chosen", "rejected"):
            prompt = tokens(row["prompt"])["input_ids"]
            ids = torch.tensor([[*prompt, *tokens(row[which])["input_ids"], tokens.eos_token_id]])
            with torch.no_grad():
                each = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
            out.append(each[len(prompt) - 1 :].sum())
    return torch.stack(out).view(-1, 2)


@pytest.mark.parametrize("method", METHODS)
def test_preferences(method: str, chat_model: str, tmp_path: Path, trl: Any) -> None:
    """The reference is the base of the same model, also for an adapter that does not start as nothing."""
    watched = Watched(chat_model, method)
    with torch.no_grad():
        for parameter in watched.adapter.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    watched.start = {k: v.detach().clone() for k, v in watched.adapter.state().items()}
    bare = tf.AutoModelForCausalLM.from_pretrained(chat_model).eval()
    args = trl.DPOConfig(str(tmp_path / "out"), precompute_ref_log_probs=True, **ARGS)
    with peftree.disabled(watched.model):
        trainer = trl.DPOTrainer(
            watched.model, args=args, train_dataset=rows(pairs()), processing_class=words(), optimizers=adam(watched)
        )
    assert trainer.ref_model is None
    found = torch.tensor([[r["ref_chosen_logps"], r["ref_rejected_logps"]] for r in trainer.train_dataset])
    torch.testing.assert_close(found, scores(bare, pairs()), atol=1e-4, rtol=0)
    assert not torch.allclose(found, scores(watched.model.eval(), pairs()), atol=1e-2)
    trainer.train()
    losses = curve(trainer, "loss")
    assert mean(losses[-3:]) < losses[0]
    watched.check(tmp_path / "adapter")


@pytest.mark.parametrize("method", METHODS)
def test_rewards(method: str, chat_model: str, tmp_path: Path, trl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards rise, and the divergence is that from the base of the same model; no second one is loaded."""
    watched = Watched(chat_model, method)
    loaded: list[Any] = []
    create = trl.trainer.grpo_trainer.create_model_from_path
    monkeypatch.setattr(
        trl.trainer.grpo_trainer, "create_model_from_path", lambda *a, **k: loaded.append(a) or create(*a, **k)
    )

    def reference(**inputs: Any) -> Any:
        with peftree.disabled(watched.model):
            return watched.model(**inputs)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(text.split().count("good")) for text in completions]

    settings = ARGS | {"max_steps": 24}
    args = trl.GRPOConfig(
        str(tmp_path / "out"), num_generations=8, max_completion_length=6, temperature=1.0, **settings
    )
    trainer = trl.GRPOTrainer(
        watched.model, reward, args=args, train_dataset=rows([{"prompt": p["prompt"]} for p in pairs()]),
        processing_class=words(), optimizers=adam(watched, 3e-2),
    )  # fmt: skip
    trainer.ref_model, trainer.beta = reference, 0.01
    ids = torch.randint(3, 30, (2, 9))
    told, _, _ = trainer._get_per_token_logps_and_entropies(reference, ids, torch.ones_like(ids), 5)
    bare = tf.AutoModelForCausalLM.from_pretrained(chat_model).eval()
    with torch.no_grad():
        want = bare(ids).logits.log_softmax(-1)[:, 3:-1].gather(2, ids[:, 4:, None])[..., 0]
    torch.testing.assert_close(told, want, atol=1e-4, rtol=0)
    trainer.train()
    rewards, kl = curve(trainer, "reward"), curve(trainer, "kl")
    assert mean(rewards[-8:]) > mean(rewards[:8]) and not loaded
    assert kl[-1] > 0
    watched.check(tmp_path / "adapter")
