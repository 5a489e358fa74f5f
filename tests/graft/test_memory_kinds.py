"""Prefixes and prompts in attention of many kinds, against one dense formula: softmax(q [P; K]) [P; V]."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import peftree
import zoo
from graft.helpers import far, put
from graft.test_memory import GREEDY, L, positions, text
from peftree.errors import AdapterError, MethodError, PeftreeWarning

LATENT: dict[str, Any] = zoo.LLAMA | {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 6, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "latent keys and values": ("DeepseekV3", LATENT),
    "layers of other heads": (
        "Laguna",
        zoo.LLAMA | EXPERTS | {
            "head_dim": 8, "num_attention_heads_per_layer": [4, 2], "layer_types": ["full_attention"] * 2,
            "mlp_layer_types": ["dense"] * 2, "num_experts": 4, "shared_expert_intermediate_size": 16,
        },
    ),
    "some layers without softmax": (
        "MiniMax",
        zoo.LLAMA | {"layer_types": ["full_attention", "linear_attention"], "num_local_experts": 2, "head_dim": 8},
    ),
}  # fmt: skip
WINDOW = 4
SEES: dict[str, Any] = {
    "text_config": zoo.LLAMA | {
        "head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
    },
    "vision_config": zoo.SHAPE | {"image_size": zoo.PIXELS, "patch_size": 8},
    "mm_tokens_per_image": 4, "image_token_index": zoo.IMAGE, "boi_token_index": 3, "eoi_token_index": 4,
}  # fmt: skip
PREFIX: dict[int, tuple[Tensor, Tensor]] = {}


def dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as a formula, with the keys and values of PREFIX before those of the text."""
    mask = query.new_zeros(1, 1, 1, key.shape[2]) if attention_mask is None else attention_mask
    if (layer := module.__dict__.get("layer_idx")) in PREFIX:
        K, V = (t[None].transpose(1, 2).expand(len(key), -1, -1, -1) for t in PREFIX[layer])
        key, value = torch.cat([K, key], 2), torch.cat([V, value], 2)
        mask = torch.cat([mask.new_zeros(*mask.shape[:3], L), mask], 3)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * kwargs["scaling"] + mask
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value), None


AttentionInterface.register("dense_for_tests", dense)
AttentionMaskInterface.register("dense_for_tests", eager_mask)


def build(kind: str) -> nn.Module:
    """A tiny generator of a kind."""
    torch.manual_seed(0)
    if kind == "masks by kind of layer":
        return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(**SEES)).eval()
    family, fields = KINDS[kind]
    model: nn.Module = getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**fields))
    return model.eval()


def expected(kind: str, adapter: Any, **inputs: Tensor) -> Tensor:
    """Logits of the plain model by the dense formula with the adapter's keys and values."""
    plain: Any = build(kind)
    plain.set_attn_implementation("dense_for_tests")
    for _, site, delta in adapter.entries:
        PREFIX[site.layer] = tuple(t.detach() for t in delta.memory(None, None))  # type: ignore[assignment]
    try:
        with torch.no_grad():
            found: Tensor = plain(**inputs, use_cache=False).logits
            return found
    finally:
        PREFIX.clear()


def prefixed(kind: str, **fields: Any) -> tuple[nn.Module, Any]:
    model = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftreeWarning)
        return model, put(model, "prefix_tuning", length=L, std=0.5, **fields)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", [*KINDS, "masks by kind of layer"])
def test_a_prefix_is_the_dense_formula(kind: str, side: str) -> None:
    model, adapter = prefixed(kind)
    batch = text(side)
    own = positions(batch["attention_mask"])
    want = expected(kind, adapter, **batch, position_ids=own + L)
    with torch.no_grad():
        got = model(**batch, position_ids=own).logits
        off = build(kind)(**batch, position_ids=own).logits
        real = batch["attention_mask"].bool()
        assert far(got[real], want[real]) < 1e-5 and far(off[real], want[real]) > 1e-3
        for row in range(3):
            alone = model(batch["input_ids"][row][real[row]][None]).logits[0]
            assert far(got[row][real[row]], alone) < 1e-5


@pytest.mark.parametrize("kind", [*KINDS, "masks by kind of layer"])
def test_generation_with_a_cache_is_that_without(kind: str) -> None:
    model, _ = prefixed(kind)
    batch = text("left")
    greedy = model.generate(**batch, max_new_tokens=6, **GREEDY)
    assert torch.equal(greedy, model.generate(**batch, max_new_tokens=6, use_cache=False, **GREEDY))


def test_keys_wider_than_values() -> None:
    _, adapter = prefixed("latent keys and values")
    assert [tuple(t.shape) for t in next(iter(adapter.deltas.values())).memory(None, None)] == [(L, 4, 12), (L, 4, 6)]
    _, adapter = prefixed("latent keys and values", hidden=5)
    delta: Any = next(iter(adapter.deltas.values()))
    before = delta.memory(None, None)
    adapter.finish()
    assert all(torch.equal(a, b) for a, b in zip(before, delta.memory(None, None), strict=True))
    assert sum(p.numel() for p in adapter.parameters()) == 2 * L * 4 * (12 + 6)


def test_layers_that_take_no_memory_are_left_out_and_named() -> None:
    kind = "some layers without softmax"
    with pytest.warns(PeftreeWarning, match=r"1 of 2 sites get no memory.*text:attn@1") as seen:
        adapter = peftree.adapt(build(kind), "prefix_tuning", length=L)
    assert len(seen) == 1 and [site.layer for _, site, _ in adapter.entries] == [0]
    with pytest.raises(MethodError, match="does not call transformers' attention"):
        peftree.adapt(build(kind), "prefix_tuning", length=L, layers="1")


def seen(side: str) -> dict[str, Tensor]:
    """Rows of 8 and 12 tokens, each with an image of 4 tokens, which see each other."""
    batch = {k: v[:2] for k, v in text(side, length=12).items()}
    batch["attention_mask"][0] = torch.arange(12) >= 4 if side == "left" else torch.arange(12) < 8
    batch["attention_mask"][1] = 1
    ids = batch["input_ids"].clone().clamp(min=8).masked_fill(batch["attention_mask"] == 0, zoo.PAD)
    for row, first in enumerate((5, 3) if side == "left" else (2, 3)):
        ids[row, first : first + 4] = zoo.IMAGE
    pixels = torch.randn(2, 3, zoo.PIXELS, zoo.PIXELS, generator=torch.Generator().manual_seed(2))
    kinds = (ids == zoo.IMAGE).long()
    return {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
        "token_type_ids": kinds,
        "pixel_values": pixels,
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_images_and_text(method: str, side: str) -> None:
    """Masks by kind of layer, made outside of the text stack: an image's tokens see each other, others look back."""
    kind, batch = "masks by kind of layer", seen(side)
    model, plain = build(kind), build(kind)
    adapter = put(model, method, length=L, std=0.5)
    real, own = batch["attention_mask"].bool(), positions(batch["attention_mask"])
    with torch.no_grad():
        got = model(**batch).logits
        if method == "prefix_tuning":
            want = expected(kind, adapter, **batch, position_ids=own + L)
        else:  # the tokens among the embedded ones, after the padding, as the text of a prompt would be
            P, embedded = (
                next(iter(adapter.deltas.values())).P.detach(),
                plain.get_input_embeddings()(batch["input_ids"]),
            )
            want = torch.zeros_like(got)
            for row in range(2):
                keep, ones = real[row], torch.ones(1, L, dtype=torch.long)
                inputs = torch.cat([P, embedded[row][keep]])[None]
                kinds = torch.cat([0 * ones, batch["token_type_ids"][row : row + 1, keep]], 1)
                out = plain(
                    inputs_embeds=inputs, token_type_ids=kinds, pixel_values=batch["pixel_values"][row : row + 1]
                )
                want[row, keep] = out.logits[0, L:]
    assert far(got[real], want[real]) < 1e-5


def test_images_and_text_generate() -> None:
    kind, batch = "masks by kind of layer", seen("left")
    for method in ("prefix_tuning", "prompt_tuning"):
        model = build(kind)
        put(model, method, length=L, std=0.5)
        outs = [model.generate(**batch, max_new_tokens=8, use_cache=on, **GREEDY)[:, 12:] for on in (True, False)]
        assert torch.equal(*outs), method
        one = {k: v[:1, 4:] if k != "pixel_values" else v[:1] for k, v in batch.items()}
        assert torch.equal(model.generate(**one, max_new_tokens=8, **GREEDY)[0, 8:], outs[0][0]), method


def albert(**fields: Any) -> Any:
    """One layer that runs three times, behind embeddings of another width."""
    torch.manual_seed(0)
    more = {"embedding_size": 12, "num_hidden_layers": 3}
    return tf.AlbertModel(tf.AlbertConfig(**zoo.BERT | more | fields)).eval()


def test_a_prompt_before_a_layer_that_runs_again_and_again() -> None:
    model, plain, batch = albert(), albert(), text("right")
    P = next(iter(put(model, "prompt_tuning", length=L, std=0.5).deltas.values())).P.detach()
    embedded = plain.get_input_embeddings()(batch["input_ids"])
    whole = torch.cat([torch.ones(3, L, dtype=torch.long), batch["attention_mask"]], 1)
    with torch.no_grad():
        got = model(**batch, output_hidden_states=True)
        want = plain(inputs_embeds=torch.cat([P.expand(3, -1, -1), embedded], 1), attention_mask=whole)
        real, hidden = batch["attention_mask"].bool(), want.last_hidden_state[:, L:]
        assert far(got.last_hidden_state[real], hidden[real]) < 1e-5
        assert far(got.pooler_output, torch.tanh(plain.pooler(hidden[:, 0]))) < 1e-5
    assert all(h.shape == (3, 7, zoo.HIDDEN) for h in got.hidden_states)


def test_a_side_network_beside_a_layer_that_runs_again_and_again() -> None:
    """It sees what enters the first run and what leaves the last, and is added once."""
    model, plain, batch = albert(), albert(), text("right")
    adapter = put(model, "lst", reduction=4, std=0.3)
    delta: Any = next(iter(adapter.deltas.values()))
    with torch.no_grad():
        got = model(**batch).last_hidden_state
        states = plain(**batch, output_hidden_states=True).hidden_states
        m, real = torch.sigmoid(delta.a / delta.T)[0], batch["attention_mask"].bool()
        first, last = (h @ P.T + b for h, P, b in zip((states[0], states[-1]), delta.P, delta.b, strict=True))
        s = m * first + (1 - m) * last
        block = delta.net[0]

        def rms(x: Tensor, weight: Tensor) -> Tensor:
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

        q, k, v = (rms(s, block.norm1) @ block.qkv.T).unflatten(-1, (3, zoo.HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~real[:, None, None], -1e30)
        s = s + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ block.o.T
        s = s + torch.nn.functional.gelu(rms(s, block.norm2) @ block.up.T) @ block.down.T
        want = states[-1] + rms(s, delta.n) @ delta.U.T + delta.c
    assert far(got[real], want[real]) < 1e-5 and far(states[-1][real], want[real]) > 1e-3


PLAIN: dict[str, dict[str, Any]] = {
    "OpenAIGPT": {"n_embd": zoo.HIDDEN, "n_layer": 2, "n_head": zoo.HEADS, "n_positions": 40, "vocab_size": zoo.VOCAB},
    "LayoutLM": zoo.BERT | {"max_2d_position_embeddings": 64},
}


@pytest.mark.parametrize("family", PLAIN)
def test_a_prompt_in_stacks_that_reshape_or_read_more_of_each_token(family: str) -> None:
    """OpenAI's GPT gives its output the shape of its input; each token of LayoutLM has a box as well."""

    def made() -> Any:
        torch.manual_seed(0)
        return getattr(tf, f"{family}Model")(getattr(tf, f"{family}Config")(**PLAIN[family])).eval()

    model, plain, batch = made(), made(), text("right")
    del batch["attention_mask"]
    P = next(iter(put(model, "prompt_tuning", length=L, std=0.5).deltas.values())).P.detach()
    inputs = {"inputs_embeds": torch.cat([P.expand(3, -1, -1), plain.get_input_embeddings()(batch["input_ids"])], 1)}
    if family == "LayoutLM":
        batch["bbox"] = torch.randint(0, 60, (3, 7, 1), generator=torch.Generator().manual_seed(4)).expand(-1, -1, 4)
        inputs["bbox"] = torch.cat([torch.zeros(3, L, 4, dtype=torch.long), batch["bbox"]], 1)
    with torch.no_grad():
        got, want = model(**batch).last_hidden_state, plain(**inputs).last_hidden_state[:, L:]
        assert far(got, want) < 1e-5 and far(plain(**batch).last_hidden_state, want) > 1e-3


MASKS: dict[str, dict[str, Any]] = {
    "Deberta": zoo.BERT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},  # ones and zeros, whole numbers
    "Longformer": zoo.BERT | {"attention_window": 4, "pad_token_id": 1},  # [batch, tokens], added to the scores
}


@pytest.mark.parametrize("family", MASKS)
def test_a_side_network_follows_masks_of_every_form(family: str) -> None:
    torch.manual_seed(0)
    model = getattr(tf, f"{family}Model")(getattr(tf, f"{family}Config")(**MASKS[family])).eval()
    batch = text("right")
    with torch.no_grad():
        base = model(**batch)[0]
        put(model, "lst", reduction=4, std=0.3)
        got, real = model(**batch)[0], batch["attention_mask"].bool()
        assert far(got[real], base[real]) > 1e-3
        for row in range(3):
            alone = model(batch["input_ids"][row][real[row]][None])[0][0]
            assert far(got[row][real[row]], alone) < 1e-5, row


def test_layers_that_do_not_keep_one_shape_refuse_a_side_network() -> None:
    model = tf.FunnelBaseModel(
        tf.FunnelConfig(vocab_size=64, d_model=32, n_head=4, d_head=8, d_inner=48, block_sizes=[1, 1])
    )
    peftree.adapt(model, "lst", reduction=4)
    with pytest.raises(AdapterError, match=r"\[3, 4, 32\] from \[3, 7, 32\]"):
        model(**text("right"))
