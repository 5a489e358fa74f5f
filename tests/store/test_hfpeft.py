"""Hugging Face PEFT as the oracle, both ways: the same files, the same output within 1e-5."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load as unpack

import zoo
from peftree import registry, store
from peftree.errors import StoreError
from peftree.store.folder import CONFIG, MANIFEST, PEFT
from peftree.store.hfpeft import dialects
from peftree.store.hfpeft.declared import Declared
from store import tools

TOLERANCE = 1e-5
WRITTEN_HERE = [d for d in dialects() if not isinstance(d, Declared)]  # those are in test_hfpeft_declared.py
SAME_OUT = "attn.o ffn.up"  # GPT-2's projections that are not fused


def theirs(name: str, folder: Path) -> torch.Tensor:
    """Return what PEFT computes with an adapter folder, virtual tokens taken out of its output."""
    with tools.Quiet():
        model = peft.PeftModel.from_pretrained(zoo.build(name), folder).eval()
        return tools.output(name, model)


def ours(name: str, folder: Path) -> torch.Tensor:
    """Return what we compute with it."""
    model = zoo.build(name)
    store.load(model, folder)
    return tools.output(name, model)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference; the longer output has virtual tokens in front."""
    n = min(one.shape[1], other.shape[1])
    return float((one[:, -n:] - other[:, -n:]).abs().max())


def effect(name: str, changed: torch.Tensor) -> float:
    """Return how far an output is from the base model's."""
    return gap(changed, tools.output(name, zoo.build(name)))


WRITTEN: list[tuple[str, str, dict[str, Any]]] = [
    *[(name, "lora", {}) for name in ("llama", "bert_cls", "roberta", "distilbert", "t5", "vit", "clip", "whisper")],
    ("gpt2", "lora", {"sites": SAME_OUT}),
    ("llama", "lora", {"sites": "linear head", "alpha": 3.0, "r": 3}),
    ("llama", "lora", {"sites": "embed"}),
    ("llama", "lora", {"layers": "1"}),
    ("resnet", "lora", {"sites": "conv"}),
    ("llama", "rslora", {"sites": "linear"}),
    ("llama", "lora_plus", {}),
    ("llama", "pissa", {}),
    ("bert_cls", "pissa", {"rank_stabilized": True}),
    *[(name, method, {}) for name in ("llama", "bert_cls") for method in ("dora", "ia3", "layernorm")],
    *[(name, "vera", {"r": 4}) for name in ("llama", "bert_cls")],
    ("llama", "vera", {"r": 4, "sites": "linear", "basis_seed": 5}),
    *[(name, "oft", {"block": 8}) for name in ("llama", "bert_cls")],
    *[(name, "fourierft", {"n": 20, "basis_seed": 3}) for name in ("llama", "bert_cls")],
    *[(name, "adalora", {"r": 4, "target_r": 2}) for name in ("llama", "bert_cls")],
    ("gpt2", "dora", {"sites": SAME_OUT}),
    ("gpt2", "vera", {"r": 4, "sites": SAME_OUT}),
    ("gpt2", "adalora", {"r": 4, "target_r": 2, "sites": SAME_OUT}),
    ("t5", "ia3", {}),
    ("gemma", "layernorm", {}),
    *[("llama", method, {"length": 3}) for method in ("prompt_tuning", "prefix_tuning", "llama_adapter")],
    ("llama", "sk_tuning", {"ids": "5 6 7"}),
    ("gpt2", "prefix_tuning", {"length": 3}),
    ("qwen3", "prefix_tuning", {"length": 3}),
    ("mistral", "llama_adapter", {"length": 3, "layers": "1"}),
]


@pytest.mark.parametrize(("name", "method", "fields"), WRITTEN)
def test_peft_computes_the_same_with_our_files(name: str, method: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model, adapter = tools.adapted(name, method, **fields)
    folder = store.save(adapter, tmp_path / "a", format="peft")
    wanted = tools.output(name, model)
    assert effect(name, wanted) > 1e-3
    assert gap(wanted, theirs(name, folder)) < TOLERANCE
    assert torch.equal(wanted, ours(name, folder)), "with our manifest it comes back to the bit"
    (folder / MANIFEST).unlink()
    assert gap(wanted, ours(name, folder)) < TOLERANCE, "without it the config says enough"


def test_every_mapping_is_covered() -> None:
    known = registry.methods()
    covered = {d.peft_type for d in WRITTEN_HERE for _, m, _ in WRITTEN if d.writes(registry.make(m, {}))}
    assert covered == {d.peft_type for d in WRITTEN_HERE}
    assert all(name in known for d in dialects() for name in d.ours)


def lora(**fields: Any) -> Any:
    """Return a call that makes a PEFT config of LoRA."""
    return partial(peft.LoraConfig, **({"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]} | fields))


CLS: dict[str, Any] = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
LLAMA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
READ: dict[str, tuple[str, Any]] = {
    "LoRA": ("llama", lora()),
    "rsLoRA": ("qwen3", lora(use_rslora=True)),
    "LoRA on all linear": ("llama", lora(target_modules="all-linear")),
    "LoRA on all linear with a classifier": ("bert_cls", lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "LoRA with a classifier": ("bert_cls", lora(**CLS)),
    "LoRA with two heads": ("distilbert", lora(target_modules=["q_lin"], task_type="SEQ_CLS")),
    "LoRA with a nested head": ("roberta", lora(**CLS)),
    "LoRA on T5": ("t5", lora(target_modules=["q", "v"])),
    "LoRA on ViT": ("vit", lora()),
    "LoRA on a fused projection": ("gpt2", lora(target_modules=["c_attn"], task_type="CAUSAL_LM")),
    "LoRA on an embedding, with a copy of it": ("llama", lora(target_modules=["embed_tokens", "q_proj"])),
    "LoRA on convolutions": ("resnet", lora(target_modules=["convolution"])),
    "LoRA in one layer": ("llama", lora(layers_to_transform=[1])),
    "LoRA in one layer of a list": ("llama", lora(layers_to_transform=0, layers_pattern="layers")),
    "LoRA but for some": (
        "llama",
        lora(target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    ),
    "DoRA": ("llama", lora(use_dora=True)),
    "DoRA stabilized": ("bert_cls", lora(use_dora=True, use_rslora=True, **CLS)),
    "DoRA on a fused projection": ("gpt2", lora(target_modules=["c_attn"], use_dora=True)),
    "IA3": ("llama", partial(peft.IA3Config, **LLAMA, feedforward_modules=["down_proj"])),
    "IA3 on BERT": (
        "bert_cls",
        partial(peft.IA3Config, target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "IA3 on GPT-2": ("gpt2", partial(peft.IA3Config, task_type="CAUSAL_LM")),
    "IA3 on T5": ("t5", partial(peft.IA3Config, task_type="SEQ_2_SEQ_LM")),
    "VeRA": ("llama", partial(peft.VeraConfig, **LLAMA, r=4)),
    "VeRA by seed": ("bert_cls", partial(peft.VeraConfig, **CLS, r=4, save_projection=False, projection_prng_key=7)),
    "OFT": ("llama", partial(peft.OFTConfig, **LLAMA, oft_block_size=8, use_cayley_neumann=False)),
    "OFT by number": ("bert_cls", partial(peft.OFTConfig, **CLS, r=4, oft_block_size=0, use_cayley_neumann=False)),
    "FourierFT": ("llama", partial(peft.FourierFTConfig, **LLAMA, n_frequency=20)),
    "FourierFT on BERT": ("bert_cls", partial(peft.FourierFTConfig, **CLS, n_frequency=20, scaling=90.0)),
    "LN tuning": ("llama", partial(peft.LNTuningConfig, target_modules=["input_layernorm", "norm"])),
    "LN tuning with biases": (
        "bert_cls",
        partial(peft.LNTuningConfig, target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    ),
    "LN tuning of 1 + w": ("gemma", partial(peft.LNTuningConfig, target_modules=["norm"])),
    "AdaLoRA": ("llama", partial(peft.AdaLoraConfig, **LLAMA, init_r=6, target_r=3, total_step=50, lora_alpha=5)),
    "AdaLoRA on BERT": (
        "bert_cls",
        partial(peft.AdaLoraConfig, **CLS, init_r=6, target_r=3, total_step=50, tinit=5, tfinal=9),
    ),
    "prompt tuning": ("llama", partial(peft.PromptTuningConfig, num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "P-tuning": (
        "llama",
        partial(peft.PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=9, task_type="CAUSAL_LM"),
    ),
    "prefix tuning": ("llama", partial(peft.PrefixTuningConfig, num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prefix tuning on GPT-2": ("gpt2", partial(peft.PrefixTuningConfig, num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prefix tuning by a network": (
        "qwen3",
        partial(
            peft.PrefixTuningConfig,
            num_virtual_tokens=3,
            task_type="CAUSAL_LM",
            prefix_projection=True,
            encoder_hidden_size=9,
        ),
    ),
    "LLaMA-Adapter": (
        "llama",
        partial(peft.AdaptionPromptConfig, adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    ),
    "LLaMA-Adapter on Mistral": (
        "mistral",
        partial(peft.AdaptionPromptConfig, adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    ),
}


def peft_folder(name: str, config: Any, folder: Path) -> torch.Tensor:
    """Save a shaken PEFT adapter and return its output."""
    with tools.Quiet():
        model = peft.get_peft_model(zoo.build(name), config())
        tools.shake([p for p in model.parameters() if p.requires_grad])
        model.eval().save_pretrained(folder)
        return tools.output(name, model)


@pytest.mark.parametrize("case", READ)
def test_we_compute_the_same_with_pefts_files(case: str, tmp_path: Path) -> None:
    name, config = READ[case]
    wanted = peft_folder(name, config, tmp_path / "a")
    model = zoo.build(name)
    adapter = store.load(model, tmp_path / "a")
    found = tools.output(name, model)
    assert effect(name, wanted) > 1e-5
    assert gap(wanted, found) < TOLERANCE
    folder = store.save(adapter, tmp_path / "b")
    assert torch.equal(found, ours(name, folder)), "saved again, it comes back to the bit"


def _type(config: Any) -> str:
    with tools.Quiet():
        return str(config().peft_type.value)


def test_every_mapping_is_read() -> None:
    assert {_type(config) for _, config in READ.values()} == {d.peft_type for d in WRITTEN_HERE}


def test_ranks_that_peft_has_cut_off_come_back_as_zeros(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(**LLAMA, init_r=4, target_r=1, total_step=4, tinit=0, tfinal=1)
    with tools.Quiet():
        model = peft.get_peft_model(zoo.build("llama"), config)
        tools.shake([p for p in model.parameters() if p.requires_grad])
        for step in range(5):
            model(**zoo.batch("llama")).loss.backward()
            model.base_model.update_and_allocate(step)
            model.zero_grad()
        model.eval()
        wanted = tools.output("llama", model)
        model.save_pretrained(tmp_path / "a")
    pattern = json.loads((tmp_path / "a" / CONFIG).read_text())["rank_pattern"]
    assert pattern
    assert any(not all(mask) for mask in pattern.values())
    fresh = zoo.build("llama")
    adapter = store.load(fresh, tmp_path / "a")
    assert gap(wanted, tools.output("llama", fresh)) < TOLERANCE
    alive = [t for k, t in adapter.state().items() if k.endswith("alive")]
    assert sum(int(t.sum()) for t in alive) == sum(sum(mask) for mask in pattern.values())


def test_pissa_of_peft_is_read_in_its_converted_form(tmp_path: Path) -> None:
    with tools.Quiet():
        model = peft.get_peft_model(zoo.build("llama"), lora(init_lora_weights="pissa")())
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        tools.shake([p for p in model.parameters() if p.requires_grad])
        wanted = tools.output("llama", model.eval())
        model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        model.save_pretrained(tmp_path / "residual")
    assert gap(wanted, ours("llama", tmp_path / "a")) < TOLERANCE
    assert gap(wanted, ours("llama", tmp_path / "residual")) < TOLERANCE, "the start is taken out again"


NATIVE_ONLY: list[tuple[str, str, dict[str, Any], str]] = [
    ("gpt2", "lora", {}, "parts of the fused projection"),
    ("gpt2", "lora", {"sites": "attn.q attn.k attn.v"}, "slices of a fused projection that differ"),
    ("mixtral", "lora", {"sites": "linear"}, "slices of a fused projection that differ"),
    ("llama", "houlsby", {}, "no method that equals houlsby"),
    ("llama", "mam", {}, "no method that equals mam"),
    ("llama", "prefix_tuning", {"hidden": 8}, "not yet folded in"),
    ("llama", "prefix_tuning", {"shift": False}, "keeps its positions"),
    ("llama", "prefix_tuning", {"layers": "1"}, "one prefix for each layer"),
    ("gemma3", "prefix_tuning", {}, "sliding window"),
    ("t5", "prefix_tuning", {"sites": "decoder:attn"}, "positions in the decoder in PEFT"),
    ("roberta", "prefix_tuning", {}, "other inputs than its own forward"),
    ("bert_cls", "prompt_tuning", {}, "pools a virtual token"),
    ("t5", "prompt_tuning", {}, "only in encoder:stack"),
    ("llava", "prompt_tuning", {}, "for this class of models"),
    ("llama", "llama_adapter", {"layers": "0"}, "top layers"),
    ("gpt2", "llama_adapter", {}, "Llama and Mistral"),
    ("llama", "oft", {"block": 8, "terms": 3}, "a series of four terms"),
    ("llama", "oft", {"block": 8, "eps": {"attn.q": 0.1, "attn.v": 0.2}}, "eps differs between its sites"),
    ("llama", "fourierft", {"n": 9, "alpha": {"attn.q": 50.0, "*": 90.0}}, "alpha differs between its sites"),
    ("gpt2", "oft", {"sites": SAME_OUT}, "of kind conv1d"),
    ("llama", "fourierft", {"n": 100_000}, "fewer than n"),
    ("gpt2", "vera", {"r": 4}, "slice of the fused projection"),
]


@pytest.mark.parametrize(("name", "method", "fields", "words"), NATIVE_ONLY)
def test_what_peft_cannot_hold_is_saved_natively(
    name: str, method: str, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model, adapter = tools.adapted(name, method, **fields)
    with pytest.raises(StoreError, match=words):
        store.save(adapter, tmp_path / "a", format="peft")
    folder = store.save(adapter, tmp_path / "a")
    assert not (folder / CONFIG).exists()
    assert torch.equal(tools.output(name, model), ours(name, folder))


UNREAD: dict[str, tuple[str, Any, str]] = {
    "VeRA on a fused projection": (
        "gpt2",
        partial(peft.VeraConfig, target_modules=["c_attn"], r=4),
        "slice of the fused",
    ),
    "FourierFT on a fused projection": (
        "gpt2",
        partial(peft.FourierFTConfig, target_modules=["c_attn"], n_frequency=9),
        "slice of the fused",
    ),
    "a prefix in sliding windows": (
        "gemma2",
        partial(peft.PrefixTuningConfig, num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "sliding window",
    ),
    "LLaMA-Adapter on GPT-2": (
        "gpt2",
        partial(peft.AdaptionPromptConfig, adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
        "Llama and Mistral",
    ),
    "a method of PEFT alone": (
        "llama",
        partial(peft.WaveFTConfig, target_modules=["q_proj"], n_frequency=8),
        "no adapters of peft_type 'WAVEFT'[^~]*It reads ADALORA, ADAPTION_PROMPT,",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_would_not_be_exact_is_refused(case: str, tmp_path: Path) -> None:
    name, config, words = UNREAD[case]
    peft_folder(name, config, tmp_path / "a")
    model = zoo.build(name)
    before = tools.snapshot(model)
    with pytest.raises(StoreError, match=words):
        store.load(model, tmp_path / "a")
    assert tools.same(before, tools.snapshot(model))


def test_the_files_are_laid_out_as_peft_does(tmp_path: Path) -> None:
    peft_folder("llama", lora(), tmp_path / "theirs")
    adapter = store.load(zoo.build("llama"), tmp_path / "theirs")
    folder = store.save(adapter, tmp_path / "ours")
    made, wanted = (unpack((f / PEFT).read_bytes()) for f in (folder, tmp_path / "theirs"))
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[k], wanted[k]) for k in made)
    config, other = (json.loads((f / CONFIG).read_text()) for f in (folder, tmp_path / "theirs"))
    keys = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "init_lora_weights")
    assert {k: config[k] for k in keys if k in config} == {k: other[k] for k in keys if k in config}
    assert sorted(config["target_modules"]) == sorted(other["target_modules"])


@pytest.mark.parametrize(
    "make", [peft.LoraConfig, partial(peft.VeraConfig, r=4), partial(peft.OFTConfig, r=4, oft_block_size=0)]
)
def test_names_of_other_families_among_the_targets(make: Any, tmp_path: Path) -> None:
    with tools.Quiet():
        model = peft.get_peft_model(zoo.build("llama"), make(target_modules=["q_proj", "query", "c_attn"]))
        tools.shake([p for p in model.parameters() if p.requires_grad])
        want = tools.output("llama", model.eval())
        model.save_pretrained(tmp_path)
    assert gap(ours("llama", tmp_path), want) < TOLERANCE < effect("llama", want)
