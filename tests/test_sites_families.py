"""Families without a record of their own: the roles inference finds, and slices that are what they are named after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftree import sites

APART = ("attn.q", "attn.k", "attn.v", "attn.o")
FUSED = ("attn.qkv", "attn.o")
FEED = ("ffn.up", "ffn.down")
GATED = ("ffn.gate", *FEED)
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "bloom": {"text": (*FUSED, *FEED)},
    "falcon": {"text": (*FUSED, *FEED)},
    "phi": {"text": (*APART, *FEED)},
    "gptj": {"text": (*APART, *FEED)},
    "deberta": {"text": (*FUSED, *FEED)},
    "deberta-v2": {"text": (*APART, *FEED)},
    "modernbert": {"text": (*APART, "ffn.down")},
    "albert": {"text": (*APART, *FEED)},
    "mpnet": {"text": (*APART, *FEED)},
    "qwen2_vl": {"text": (*APART, *GATED), "vision": (*APART, *FEED)},
    "qwen2_5_vl": {"text": (*APART, *GATED), "vision": (*APART, *GATED)},
    "mllama": {"text": (*APART, *GATED, "xattn.q", "xattn.v"), "vision": (*APART, *FEED)},
    "wav2vec2": {"audio": (*APART, *FEED)},
    "convnextv2": {"vision": FEED},
    "falcon_h1": {"text": APART},
    "deepseek_v3": {"text": ("attn.q", "attn.kv", "attn.o", *GATED)},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_roles_of_a_family(kind: str) -> None:
    config = tf.CONFIG_MAPPING[kind]()
    for part in (config, config.get_text_config(), getattr(config, "vision_config", config)):
        for name in ("num_hidden_layers", "n_layer", "depth", "num_global_layers"):
            if isinstance(part.__dict__.get(name), int) and kind != "mllama":
                setattr(part, name, 2)
    with torch.device("meta"):
        model = tf.AutoModel.from_config(config)
    found = sites.tree(model)
    for tower, roles in FAMILIES[kind].items():
        mine = [site for site in found if site.tower == tower]
        assert set(roles) <= {site.role for site in mine}, (tower, {site.role for site in mine})
    assert sites.resolve(model, "linear") and not sites.why_unclear(model)


def test_a_slice_is_the_part_it_is_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of `attn.q` changes the queries that the attention function gets, and nothing else; so k and v."""
    wide = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model: Any = tf.ModernBertModel(tf.ModernBertConfig(vocab_size=32, **wide, **ids)).eval()
    seen: dict[str, Tensor] = {}
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.update(q=q.detach().clone(), k=k.detach().clone(), v=v.detach().clone())
        return inner(module, q, k, v, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", spy)
    rows = torch.arange(3, 9)[None]
    model(rows)
    before = dict(seen)
    for site in sites.resolve(model, "attn.q attn.k attn.v"):
        weight = model.get_submodule(site.path).weight
        old = weight.detach().clone()
        assert site.rows is not None
        with torch.no_grad():
            weight[slice(*site.rows)] += 1
        model(rows)
        assert [name for name in "qkv" if not torch.equal(seen[name], before[name])] == [site.role[-1]]
        with torch.no_grad():
            weight.copy_(old)
