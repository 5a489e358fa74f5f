"""Trains every method with a sharded base beside a whole one: `torchrun --nproc-per-node 2 benchmarks/sharded.py`.

The models are a Llama and a BERT of two layers; small fields, three steps, one pair of processes for all. A line a
method and model: whether both adapters and losses agree to 1e-5 of their largest entries, the scores are equal, and the
base is equal to the bit when the adapter is off. `--methods lora,dora` and `--more key=value` choose; some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

import torch
import transformers as tf
from torch import Tensor
from torch.distributed.tensor import DTensor

from peftree import registry
from peftree.adapter import disabled
from peftree.errors import PeftreeError
from peftree.settings import load_config
from peftree.train.processes import join, team
from peftree.train.run import complete
from train.tiny import SHAPE, WORDS, reviews, save, tokenizer, write_csv, write_jsonl

FIELDS = {
    "bert": ["config.hidden_dropout_prob=0", "config.attention_probs_dropout_prob=0"],
    "llama": [],
}
MOST = 1e-5


def prepare(folder: Path) -> None:
    """Write models and rows."""
    words = tokenizer()
    sizes: dict[str, Any] = {**SHAPE, "vocab_size": len(words), "max_position_embeddings": 64}
    save("BertForSequenceClassification", tf.BertConfig(**sizes), folder / "bert", words)
    special = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    save("LlamaForCausalLM", tf.LlamaConfig(**sizes, **special, num_key_value_heads=2), folder / "llama", words)
    for name in FIELDS:
        (folder / f"{name}-rows").mkdir()
    for split, n in (("train", 28), ("valid", 8)):
        write_csv(folder / "bert-rows" / f"{split}.csv", reviews(n, len(split)))
        told = [(f"the {WORDS[i % 4]} film w{i % 20}", f"{WORDS[i % 4]} a plot"[: 20 - i % 3]) for i in range(n)]
        write_jsonl(folder / "llama-rows" / f"{split}.jsonl", told)


def trained(folder: Path, model: str, name: str, shard: str, more: list[str]) -> dict[str, Any]:
    """Train, and return what is compared."""
    small = registry.get(name).tags.small or {}
    words = [f"model={folder / model}", f"data={folder / f'{model}-rows'}", f"method={name}", f"shard={shard}",
             f"output={folder / f'{model}-{name}-{shard}'}", "steps=3", "log_every=1", "batch_size=4", "max_length=16",
             "eval_every=2", "save_every=2", "base_score=false", "quiet=true", *FIELDS[model], *more]  # fmt: skip
    found, opened = complete(load_config(None, [*words, *(f"method.{k}={json.dumps(v)}" for k, v in small.items())]))
    net: Any = opened.task.model.eval()
    own = {id(p) for p in opened.adapter.parameters()}
    base = {n: p for n, p in net.named_parameters() if id(p) not in own}
    with torch.no_grad(), disabled(net):
        off = net(input_ids=torch.arange(3, 15).view(2, 6)).logits
    return {
        "losses": torch.tensor([p.loss for p in found.curve if p.loss is not None]), "score": found.score, "off": off,
        "base": {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in base.items()},
        "state": {n: t.detach().clone() for n, t in opened.adapter.state().items()},
        "parts": sum(isinstance(p, DTensor) for p in base.values()),
    }  # fmt: skip


def far(one: Tensor, two: Tensor) -> float:
    """Return the largest difference, relative to the largest entry."""
    one, two = one.double(), two.double()
    return float((one - two).abs().max() / one.abs().max().clamp_min(1e-30)) if one.numel() else 0.0


def compared(one: dict[str, Any], two: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict and the figures."""
    apart = max((far(t, two["state"][n]) for n, t in one["state"].items()), default=0.0)
    losses = far(one["losses"], two["losses"])
    same = torch.equal(one["off"], two["off"]) and all(torch.equal(p, two["base"][n]) for n, p in one["base"].items())
    good = max(apart, losses) <= MOST and same and one["score"] == two["score"] and two["parts"] > 0
    return "equal" if good else "differs", f"adapter {apart:.1e}, losses {losses:.1e}, base equal: {same}"


def verdict(folder: Path, model: str, name: str, more: list[str]) -> tuple[str, str]:
    """Return how a method fares on a model."""
    found = []
    for shard, what in (("none", "not trained here"), ("fsdp", "refused")):
        try:
            found.append(trained(folder, model, name, shard, more))
        except PeftreeError as error:
            return what, str(error)[:160]
    return compared(*found)


def main() -> None:
    """Run everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(registry.methods()))
    parser.add_argument("--more", nargs="*", default=[], help="settings of every run")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    join(load_config(None, ["model=bert", "data=rows"]))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(team().told(made))
        if team().first:
            prepare(folder)
        team().sum(0)
        for model in FIELDS:
            counts: Counter[str] = Counter()
            for name in asked.methods.split(","):
                said, why = verdict(folder, model, name, asked.more)
                counts[said] += 1
                if team().first:
                    print(model, name, said, why, sep="\t", flush=True)
            if team().first:
                print(model, dict(counts), flush=True)
        team().sum(0)


if __name__ == "__main__":
    main()
