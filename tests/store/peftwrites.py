"""The write cases of the matrix of Hugging Face PEFT's files: a method of ours, its fields, and a model family."""

from __future__ import annotations

from functools import partial

from store.peftcases import ENCODERS, MIX, OTHERS, TEXT, Case, Options

LINEAR = "linear"
WRITES: dict[str, dict[str, tuple[str, Options]]] = {
    "lora": {
        "plain": (f"{TEXT} {ENCODERS} {OTHERS}", {}),
        "sites=linear": ("llama gpt2 bert_cls t5 vit mixtral", {"sites": LINEAR}),
        "sites=head": ("llama llama_tied gpt2", {"sites": "head"}),
        "sites=embed": ("llama gemma gpt2 bert_cls t5", {"sites": "embed"}),
        "layers=1": ("llama", {"layers": "1"}),
        "sites=conv": ("resnet", {"sites": "conv"}),
        "alpha=3, r=3": ("llama", {"alpha": 3.0, "r": 3}),
    },
    "rslora": {"plain": ("llama bert_cls", {})},
    "lora_plus": {"plain": ("llama", {})},
    "pissa": {"plain": ("llama bert_cls gpt2", {})},
    "dora": {"plain": (MIX, {}), "sites=linear": ("llama bert_cls", {"sites": LINEAR})},
    "adalora": {"plain": (MIX, {"r": 4, "target_r": 2}), "sites=linear": ("llama", {"r": 4, "sites": LINEAR})},
    "vera": {
        "plain": (MIX, {"r": 4}),
        "sites=linear, basis_seed=5": ("llama bert_cls", {"r": 4, "sites": LINEAR, "basis_seed": 5}),
    },
    "oft": {"plain": (MIX, {"block": 8}), "sites=linear": ("llama", {"block": 8, "sites": LINEAR})},
    "fourierft": {
        "n by site": ("llama bert_cls", {"n": {"attn.q": 9, "*": 20}}),
        "plain": (MIX, {"n": 20}),
        "sites=linear, basis_seed=3": ("llama", {"n": 20, "basis_seed": 3, "sites": LINEAR}),
    },
    "ia3": {"plain": ("llama gpt2 bert_cls t5 vit bart opt mixtral", {})},
    "layernorm": {"plain": ("llama gemma gpt2 bert_cls t5 vit opt", {})},
    "prompt_tuning": {
        "length=3": ("llama gemma gpt2 opt bert_cls bert_tok t5", {"length": 3}),
        "length=3, sites=encoder:stack": ("t5 bart", {"length": 3, "sites": "encoder:stack"}),
    },
    "prefix_tuning": {
        "length=3": ("llama qwen3 gpt2 opt bert_cls bart t5", {"length": 3}),
        "length=3, hidden=9, finished": ("llama qwen3 gpt2", {"length": 3, "hidden": 9}),
        "length=3, hidden=9": ("llama", {"length": 3, "hidden": 9}),
    },
    "llama_adapter": {"length=3": ("llama mistral", {"length": 3, "layers": "1"})},
    "full": {"plain": ("llama bert_cls", {})},
    "bitfit": {"plain": ("gpt2", {})},
    "houlsby": {"plain": ("llama", {})},
    "unipelt": {"plain": ("bert_cls", {})},
}  # fmt: skip
WRITE: list[Case] = [
    Case(method, option, name, partial(dict, fields))
    for method, table in WRITES.items()
    for option, (names, fields) in table.items()
    for name in names.split()
]
