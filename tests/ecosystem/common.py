"""A tiny chat model in a folder, a method of every verb, and what must hold after any trainer has trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import peftree
import zoo
from train.tiny import tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}the {% endif %}"
# Reweight, Rewrite (outputs; inputs), Attend, Prepend, Side; LoReFT reads where the answer begins.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {}, "houlsby": {}, "ia3": {}, "prefix_tuning": {"length": 4}, "prompt_tuning": {"length": 4},
    "lst": {}, "loreft": {},
}  # fmt: skip


def words() -> Any:
    """Return a tokenizer with a chat template."""
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def saved(folder: Path) -> str:
    """Write a tiny model, whose logits are far enough apart to learn from, and its tokenizer."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**zoo.LLAMA | {"eos_token_id": 2}, initializer_range=0.2)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    words().save_pretrained(folder)
    return str(folder)


def pairs(n: int = 16) -> list[dict[str, str]]:
    """Return prompts, answers that can be learned, and others."""
    return [{"prompt": f"w{i} film", "chosen": " was good", "rejected": f" w{i % 5} bad"} for i in range(n)]


def examples(n: int = 16) -> list[dict[str, str]]:
    """Return prompts and completions."""
    return [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs(n)]


class Watched:
    """A model with an adapter, and all that it held before training."""

    def __init__(self, folder: str, method: str, **fields: Any) -> None:
        self.folder = folder
        self.model: Any = tf.AutoModelForCausalLM.from_pretrained(folder)
        self.base = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.adapter = peftree.adapt(self.model, method, **METHODS.get(method, {}) | fields)
        self.start = {k: v.detach().clone() for k, v in self.adapter.state().items()}

    def logits(self, model: nn.Module | None = None) -> Tensor:
        """Return the logits of one batch with padding, in eval mode."""
        made = (self.model if model is None else model).eval()
        batch = words()(["w1 film was", "w2 bad"], padding=True, return_tensors="pt")
        with torch.no_grad():
            out: Tensor = made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return out

    def check(self, folder: Path) -> None:
        """Only the adapter has changed, all of its modules were used, and it loads again to equal outputs."""
        after = self.model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in self.base.items())
        moved = [k for k, v in self.adapter.state().items() if not torch.equal(v, self.start[k])]
        trained = [k for k, v in self.adapter.state().items() if isinstance(v, nn.Parameter) and v.requires_grad]
        assert moved == trained and moved and not self.adapter.unused()
        want = self.logits()
        peftree.save(self.adapter, folder)
        fresh = tf.AutoModelForCausalLM.from_pretrained(self.folder)
        base = self.logits(fresh)
        peftree.load(fresh, folder)
        assert torch.equal(self.logits(fresh), want) and not torch.equal(want, base)
        with peftree.disabled(self.model):
            assert torch.equal(self.logits(), base)
