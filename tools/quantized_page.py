"""Adapt packed bases by every method and write the table: `python tools/quantized_page.py` (some minutes)."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftree
from peftree import registry
from peftree.deltas import packed, place
from peftree.errors import MethodError, SiteError
from peftree.graft import hub

_llama: Any = importlib.import_module("quantized.llama")  # of the tests
KINDS, loaded, logits, tokens = _llama.KINDS, _llama.loaded, _llama.logits, _llama.tokens
PAGE = ROOT / "docs" / "quantized-methods.md"
HEAD = """# Methods on quantised bases

Written by `make quantized-page`, which runs every method with small fields on a Llama of two layers, 64 units wide
(bitsandbytes {bnb}, torchao {ao}, torch {torch}): the base is scored, adapted, and trained for three passes on a CPU.

* **yes**: every trained tensor has a gradient, and the base's output is equal to the bit when the adapter is off.
* *Unpacks*: how many packed weights one training pass unpacks for the adapter, of the {whole} in the model, in NF4.
  0: the method has a form that never needs the weight, and costs what it costs on a plain base.

| method | {kinds} | unpacks |
|---|{lines}--:|
"""


def verdict(path: Path, kind: str, name: str) -> tuple[str, int]:
    """Return how a method fares on a form, and how many weights a training pass unpacks."""
    model = loaded(kind, path)
    logits(model)
    try:
        adapter = peftree.adapt(model, name, **dict(registry.get(name).tags.small or {}))
    except (MethodError, SiteError) as error:
        return f"no: {str(error).split('. ')[0]}", 0
    with peftree.disabled(model):
        base = logits(model)
    if any(part.tags.needs_data for part in (adapter.method, *adapter.method.parts())):
        adapter.init([lambda: model(input_ids=tokens(), labels=tokens()).loss] * 2)
    count = 0
    for _ in range(3):
        model.zero_grad()
        count = _pass(model)
        with torch.no_grad():
            for p in adapter.parameters():
                if p.grad is not None:
                    p.sub_(0.05 * p.grad)
    lost = [p for p in adapter.parameters() if p.requires_grad and p.grad is None]
    with peftree.disabled(model):
        same = torch.equal(logits(model), base)
    return ("yes" if same and not lost else f"no: {len(lost)} tensors without a gradient, base equal: {same}"), count


def _pass(model: Any) -> int:
    """Run a forward and a backward pass; return how many weights were unpacked."""
    seen: Counter[str] = Counter()

    def counted(module: Any, tensor: Any) -> Any:
        seen["packed"] += packed.is_packed(tensor)
        return packed.dense(module, tensor)

    modules: list[Any] = [place, hub]
    try:
        for module in modules:
            module.dense = counted
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    finally:
        for module in modules:
            module.dense = packed.dense
    return seen["packed"]


def main() -> None:
    """Run everything and write the page."""
    warnings.filterwarnings("ignore")  # of bitsandbytes and torchao; what matters here is in the table
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        LlamaForCausalLM(config).save_pretrained(path)
        whole = sum(packed.is_packed(p) for p in loaded("nf4", path).parameters())
        rows, unfit = [], []
        for name in registry.methods():
            found = [verdict(path, kind, name) for kind in KINDS]
            if all(said.startswith("no: ") and said == found[0][0] for said, _ in found):
                unfit.append(f"* {name}: {found[0][0][4:]}")
            else:
                rows.append(f"| {name} | {' | '.join(said for said, _ in found)} | {found[0][1]} |")
            print(name, *(said for said, _ in found), found[0][1], flush=True)
    version = importlib.metadata.version
    head = HEAD.format(
        bnb=version("bitsandbytes"), ao=version("torchao"), torch=version("torch"), whole=whole,
        kinds=" | ".join(KINDS), lines="---|" * len(KINDS),
    )  # fmt: skip
    text = head + "\n".join(rows) + "\n\nThese do not fit this model, packed or not:\n\n" + "\n".join(unfit) + "\n"
    PAGE.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
