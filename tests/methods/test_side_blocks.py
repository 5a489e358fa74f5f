"""The blocks of side networks against transformers' own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

import peftree
import zoo
from peftree.deltas import LayerNormBlock, SideAttention


class Everything(SideAttention):
    """Attention to all tokens."""

    encoded = None

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def seen(self, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def once(self, block: int, value: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_post_norm_block_is_a_layer_of_bert() -> None:
    adapter = peftree.adapt(zoo.build("bert_cls"), "k_adapter", size=24, heads=3, head=False)
    block = next(m for d in adapter.deltas.values() for m in d.modules() if isinstance(m, LayerNormBlock))
    config = BertConfig(hidden_size=24, num_attention_heads=3, intermediate_size=96, layer_norm_eps=1e-5)
    config._attn_implementation = "eager"
    layer = BertLayer(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.3)
    t = dict(block.named_parameters())
    names = {"attention.output.dense": "o", "intermediate.dense": "up", "output.dense": "down"}
    state = {
        f"{theirs}.{kind}": t[ours + end]
        for theirs, ours in names.items()
        for kind, end in (("weight", ""), ("bias", "_bias"))
    }
    for i, name in enumerate(("query", "key", "value")):
        state |= {
            f"attention.self.{name}.weight": t["qkv"].chunk(3)[i],
            f"attention.self.{name}.bias": t["qkv_bias"].chunk(3)[i],
        }
    for i, name in enumerate(("attention.output.LayerNorm", "output.LayerNorm")):
        state |= {f"{name}.weight": t["gain"][i], f"{name}.bias": t["shift"][i]}
    layer.load_state_dict(state)
    x = torch.randn(2, 5, 24, generator=draw)
    want = layer(x)
    assert torch.allclose(block(x, Everything()), want[0] if isinstance(want, tuple) else want, atol=1e-5)
