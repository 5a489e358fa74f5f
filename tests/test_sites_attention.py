"""Attention whose maps are convolutions, experts, of a class of their own, or unusual in number: LoRA by role."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel

import peftree
from peftree import sites
from peftree.errors import StoreError

TEXT: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = TEXT | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT: dict[str, Any] = SMALL | {"intermediate_size": 24, "max_position_embeddings": 20}
IDS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(1))


def image(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def axk2() -> nn.Module:
    return tf.AXK2Model(tf.AXK2Config(
        **SMALL, intermediate_size=24, moe_intermediate_size=8, q_lora_rank=8, kv_lora_rank=8, num_key_value_heads=2,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, index_n_heads=2, index_head_dim=8, index_topk=4, first_k_dense_replace=1, gated_norm_rank=4,
    ))  # fmt: skip


def zaya() -> nn.Module:
    return tf.ZayaForCausalLM(tf.ZayaConfig(
        **SMALL, num_key_value_heads=1, head_dim=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=1,
        router_hidden_size=8,
    ))  # fmt: skip


def jetmoe() -> nn.Module:
    return tf.JetMoeModel(tf.JetMoeConfig(
        **TEXT, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=12,
        num_local_experts=3, num_experts_per_tok=2,
    ))  # fmt: skip


def levit() -> nn.Module:
    return tf.LevitModel(tf.LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[4, 4, 4],
        drop_path_rate=0,
    ))  # fmt: skip


def mobile() -> nn.Module:
    return tf.MobileViTV2Model(tf.MobileViTV2Config(
        image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[32, 48, 64],
    ))  # fmt: skip


def swift() -> nn.Module:
    return tf.SwiftFormerModel(tf.SwiftFormerConfig(depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16], mlp_ratio=2))


def masked() -> nn.Module:
    made: nn.Module = MaskFormerSwinModel(
        tf.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    return made


CASES: dict[str, tuple[Callable[[], nn.Module], Any, str, dict[str, int]]] = {
    "queries beside a gate": (axk2, IDS, "attn.q attn.kv", {"q_gate_proj": 2, "kv_b_proj": 2}),
    "values of two maps": (zaya, IDS, "attn.q attn.v", {"q_proj": 2, "v_proj_current": 2, "v_proj_delayed": 2}),
    "queries from experts": (jetmoe, IDS, "attn.q attn.v", {"input_linear": 2, "kv_proj": 2}),
    "receptance": (
        lambda: tf.RwkvModel(tf.RwkvConfig(**TEXT, hidden_size=16, num_hidden_layers=2, intermediate_size=24)),
        IDS, "attn.q attn.v", {"receptance": 2, "value": 2},
    ),
    "maps of a class of their own": (
        lambda: tf.IBertModel(tf.IBertConfig(**BERT)), IDS, "attn.q attn.v", {"query": 2, "value": 2},
    ),
    "grouped convolutions": (
        lambda: tf.SqueezeBertModel(tf.SqueezeBertConfig(
            **BERT, embedding_size=16, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1,
            intermediate_groups=2, output_groups=2,
        )), IDS, "attn.q attn.v", {"query": 2, "value": 2},
    ),
    "a fused map and its norm": (levit, image(64), "attn.qkv", {"linear": 3}),
    "a fused convolution": (mobile, image(64), "attn.qkv", {"convolution": 3}),
    "no values": (swift, image(64), "attn.q attn.k", {"to_query": 4, "to_key": 4}),
    "other names in one type": (masked, image(32), "attn.q attn.v", {"query": 2, "value": 2}),
}  # fmt: skip


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model in eval mode with weights that are neither flat nor zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def write(bare: nn.Module, entries: Any) -> list[nn.Parameter]:
    """Put `W + scale B A` into the weights of a bare model; return the new ones."""
    for _, site, delta in entries:
        module = bare.get_submodule(site.path)
        W = module._parameters["weight"]
        assert W is not None
        new, change = W.detach().clone(), delta.scale * (delta.B.mT @ delta.A).detach()
        view = new if new.ndim == change.ndim else new.flatten(1)  # a convolution of kernel 1
        view[..., slice(*(site.rows or (None, None))), :] += change
        module._parameters["weight"] = nn.Parameter(new)
    return [bare.get_submodule(site.path)._parameters["weight"] for _, site, _ in entries]  # type: ignore[misc]


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x, use_cache=False) if not x.is_floating_point() and not isinstance(model, BERTS) else model(x)
    return next(v for v in out.values() if isinstance(v, Tensor))


BERTS = (tf.IBertModel, tf.SqueezeBertModel)


@pytest.mark.parametrize("name", CASES)
def test_lora_by_role_is_the_dense_weights(name: str) -> None:
    make, x, query, expected = CASES[name]
    model = build(make)
    bare, written = copy.deepcopy(model), copy.deepcopy(model)
    base = outputs(bare, x)
    adapter = peftree.adapt(model, "lora", sites=query, r=2, head=False)
    leaves = [site.path.rpartition(".")[2] for _, site, _ in adapter.entries]
    found = {leaf: leaves.count(leaf) for leaf in leaves}
    assert found == expected
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    with peftree.disabled(model):
        assert torch.equal(outputs(model, x), base)
    weights = write(written, adapter.entries)
    on, right = outputs(model, x), outputs(written, x)
    assert (on - right).abs().max() < 1e-4 * right.abs().max() and (right - base).norm() > 50 * (on - right).norm()
    on.pow(2).sum().backward()
    right.pow(2).sum().backward()
    for (_, site, entry), weight in zip(adapter.entries, weights, strict=True):
        delta: Any = entry
        if weight.grad is not None:
            dense = weight.grad if weight.ndim == delta.A.ndim else weight.grad.flatten(1)
            dense = dense[..., slice(*(site.rows or (None, None))), :]
            theory = delta.scale * delta.B.detach() @ dense
            torch.testing.assert_close(delta.A.grad, theory, rtol=1e-3, atol=1e-4 * float(theory.abs().max()))
    with torch.no_grad():
        peftree.merge(model)
        assert (outputs(model, x) - right).abs().max() < 1e-4 * right.abs().max()
        peftree.unmerge(model)
        peftree.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), bare.state_dict().values(), strict=True))


def test_a_list_of_layers_within_one_is_no_stack_of_its_own() -> None:
    """The last stage of LeViT holds layers of one class, the others of two: each map is one site all the same."""
    found = [(site.path, site.rows) for site in sites.resolve(levit(), "linear")]
    assert len(found) == len(set(found))


def test_linear_is_every_projection_of_attention_where_it_is_a_convolution_too() -> None:
    model = build(CASES["grouped convolutions"][0])
    paths = {site.path for site in sites.resolve(model, "linear")}
    assert {f"encoder.layers.{n}.attention.{part}" for n in (0, 1) for part in ("query", "key", "value")} == paths
    assert not any(site.kind == "attention" for site in sites.tree(model))  # widths are those of a group


def test_peft_has_no_form_for_a_map_of_a_class_of_its_own(tmp_path: Path) -> None:
    make, x, query, _ = CASES["maps of a class of their own"]
    model, fresh = build(make), build(make)
    adapter = peftree.adapt(model, "lora", sites=query, r=2, head=False)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    with pytest.raises(StoreError, match="a custom class"):
        peftree.save(adapter, tmp_path / "theirs", format="peft")
    peftree.save(adapter, tmp_path / "ours")
    peftree.load(fresh, tmp_path / "ours")
    assert torch.equal(outputs(fresh, x), outputs(model, x))


def test_a_packed_weight_is_no_matrix() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 4
            self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)

    class Map(Packed):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

    found = {site.path: site.kind for site in sites.tree(nn.ModuleDict({"packed": Packed(), "map": Map()}))}
    assert found == {"map": "expert"}


def test_a_layer_whose_attention_holds_convolutions_still_passes_vectors_of_tokens() -> None:
    """Zaya's convolutions run over the tokens of queries and keys; between its layers go no maps."""
    model = zaya().eval()
    before = model(IDS).logits.detach()
    adapter = peftree.adapt(model, "loreft", sites="layer", r=2)
    assert [site.path for _, site, _ in adapter.entries] == ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3)
        assert (model(IDS).logits - before).abs().max() > 1e-3
