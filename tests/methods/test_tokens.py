"""Prefixes, prompts, gated memories and side networks against PEFT or by hand, and their generation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import peftree
import zoo
from methods.tools import Hook, hooked, near, run, shaken
from peftree.errors import PeftreeError

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


# --- memories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["llama", "gpt2"])
@pytest.mark.parametrize("hidden", [0, 5])
def test_prefix_equals_peft(key: str, hidden: int) -> None:
    model, adapter = shaken(key, "prefix_tuning", length=3, hidden=hidden)
    got = run(key, model)
    adapter.finish()
    near(run(key, model), got)
    flat = torch.stack([d.P.detach() for d in adapter.deltas.values()])  # [layers, 2, l, heads, head_dim]
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    other: Any = peft.get_peft_model(zoo.build(key), config).eval()
    other.prompt_encoder["default"].embedding.weight.data = flat.permute(2, 0, 1, 3, 4).reshape(3, -1)
    near(got, run(key, other), run(key, zoo.build(key)))


def test_prefix_in_t5_joins_the_softmax_without_position_bias() -> None:
    model, adapter = shaken("t5", "prefix_tuning", length=3, sites="encoder:attn")
    mask = zoo.batch("t5")["attention_mask"]
    base: Any = zoo.build("t5")
    changes: dict[str, Hook] = {}
    bias = base.encoder.block[0].layer[0].SelfAttention.compute_bias(zoo.LENGTH, zoo.LENGTH)
    seen = torch.zeros(mask.shape).masked_fill(mask == 0, -1e9)[:, None, None]
    for _, site, delta in adapter.entries:
        own = base.get_submodule(site.path)

        def attention(x: Tensor, y: Any, own: Any = own, P: Tensor = delta.P) -> Any:
            q, k, v = (m(x).unflatten(-1, (zoo.HEADS, 8)) for m in (own.q, own.k, own.v))
            k, v = (torch.cat([p.expand(len(x), -1, -1, -1), t], 1) for p, t in ((P[0], k), (P[1], v)))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) + functional.pad(bias + seen, (3, 0))
            return own.o(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)), *y[1:]

        changes[site.path] = attention
    near(run("t5", model), hooked("t5", changes), run("t5", zoo.build("t5")))


def test_llama_adapter_equals_peft() -> None:
    model, adapter = shaken("llama", "llama_adapter", length=3)
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=zoo.LAYERS)
    other: Any = peft.get_peft_model(zoo.build("llama"), config).eval()
    for i, delta in enumerate(adapter.deltas.values()):
        layer = other.base_model.model.model.layers[i].self_attn
        layer.adaption_prompt.data, layer.adaption_gate.data = delta.P.detach()[None], delta.g.detach()
    near(run("llama", model), run("llama", other), run("llama", zoo.build("llama")))


# --- tokens ---------------------------------------------------------------------------------------------------------


def layers_of(key: str, model: Any) -> tuple[Any, Any, Callable[[Tensor], Tensor]]:
    """Return a vision model's embedding function, its layers, and what follows them."""
    if key == "vit":
        return model.vit.embeddings, model.vit.layers, lambda x: model.classifier(model.vit.layernorm(x)[:, 0])
    if key == "dinov2":
        inner, norm = model.dinov2, model.dinov2.layernorm

        def pooled(x: Tensor) -> Tensor:
            return model.classifier(torch.cat([norm(x)[:, 0], norm(x)[:, 1:].mean(1)], 1))

        return inner.embeddings, inner.encoder.layer, pooled
    v = model.vision_model
    start = lambda pixels: v.pre_layrnorm(v.embeddings(pixels))  # noqa: E731
    return start, v.encoder.layers, lambda x: model.visual_projection(v.post_layernorm(x[:, 0]))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("key", ["vit", "dinov2", "clip"])
def test_vpt_inserts_replaces_and_strips(key: str, deep: bool) -> None:
    model, adapter = shaken(key, "vpt", length=3, deep=deep)
    (P,) = (d.P.detach() for d in adapter.deltas.values())
    assert P.shape == (zoo.LAYERS if deep else 1, 3, zoo.HIDDEN)
    embed, layers, after = layers_of(key, zoo.build(key))
    pixels = zoo.batch(key)["pixel_values"]
    with torch.no_grad():
        x = embed(pixels)
        for i, layer in enumerate(layers):
            rest = x[:, 1:] if i == 0 else x[:, 4:]
            prompt = P[i].expand(len(x), -1, -1) if deep or i == 0 else x[:, 1:4]
            out = layer(torch.cat([x[:, :1], prompt, rest], 1), **({"attention_mask": None} if key == "clip" else {}))
            x = out[0] if isinstance(out, tuple) else out
        want = after(torch.cat([x[:, :1], x[:, 4:]], 1))
        got = model(pixel_values=pixels).logits if key != "clip" else _image_features(model, pixels)
    near(got, want)


def _image_features(model: Any, pixels: Tensor) -> Tensor:
    out = model.get_image_features(pixel_values=pixels)
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found


def test_vpt_start_and_refusals() -> None:
    model = zoo.build("vit")
    adapter = peftree.adapt(model, "vpt", length=200, head=False)
    bound = math.sqrt(6 / (3 * 8 * 8 + zoo.HIDDEN))
    P = adapter.parameters()[0].detach().abs()
    assert 0.99 * bound < float(P.max()) <= bound
    for key, sites in (("llama", "vision:stack"), ("llama", "stack"), ("swin", "vision:stack")):
        with pytest.raises(PeftreeError, match="vision"):
            peftree.adapt(zoo.build(key), "vpt", sites=sites)


@pytest.mark.parametrize("key", ["llama", "gpt2"])
def test_prompt_equals_peft(key: str) -> None:
    model, adapter = shaken(key, "prompt_tuning", length=3)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    other: Any = peft.get_peft_model(zoo.build(key), config).eval()
    other.prompt_encoder["default"].embedding.weight.data = adapter.parameters()[0].detach()
    near(run(key, model), run(key, other)[:, 3:], run(key, zoo.build(key)))


# --- side networks --------------------------------------------------------------------------------------------------


def ladder(delta: Any, taps: list[Tensor], mask: Tensor, cross: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """LST's equation written out; masks are added to the scores."""

    def norm(s: Tensor, weight: Tensor) -> Tensor:
        return s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def heads(s: Tensor, weight: Tensor) -> Tensor:
        return (s @ weight.T).unflatten(-1, (zoo.HEADS, -1))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]) + mask
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)

    gates = 1 / (1 + torch.exp(-delta.a / 0.1))
    s = taps[0] @ delta.P[0].T + delta.b[0]
    for i, block in enumerate(delta.net):
        s = gates[i] * s + (1 - gates[i]) * (taps[i + 1] @ delta.P[i + 1].T + delta.b[i + 1])
        q, k, v = (heads(norm(s, block.norm1), w) for w in block.qkv.chunk(3))
        s = s + attend(q, k, v, mask) @ block.o.T
        if cross is not None:
            encoded = cross[0] @ delta.C.T
            k, v = (heads(encoded, w) for w in block.kv.chunk(2))
            s = s + attend(heads(norm(s, block.norm3), block.q), k, v, cross[1]) @ block.cross_o.T
        s = s + functional.gelu(norm(s, block.norm2) @ block.up.T) @ block.down.T
    return norm(s, delta.n) @ delta.U.T + delta.c


def blocked(mask: Tensor, causal: bool) -> Tensor:
    """Return 0 where a key may be seen and -1e9 elsewhere, `[batch, 1, q, k]`."""
    allowed = mask[:, None, None, :].bool().expand(-1, -1, mask.shape[1], -1)
    return torch.zeros(allowed.shape).masked_fill(~(allowed.tril() if causal else allowed), -1e9)


@pytest.mark.parametrize("key", ["llama", "gpt2", "bert_cls"])
def test_lst_equals_its_equation(key: str) -> None:
    model, adapter = shaken(key, "lst", reduction=4)
    (delta,) = adapter.deltas.values()
    base: Any = zoo.build(key)
    batch = zoo.batch(key)
    path = adapter.entries[0][1].layers
    taps: list[Tensor] = []
    for i, name in enumerate(path):

        def keep(module: nn.Module, args: Any, kwargs: Any, out: Any, i: int = i) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            taps.extend([args[0]] * (i == 0) + [x])
            last = i == zoo.LAYERS - 1
            x = x + ladder(delta, taps, blocked(batch["attention_mask"], key != "bert_cls")) if last else x
            return (x, *out[1:]) if isinstance(out, tuple) else x

        base.get_submodule(name).register_forward_hook(keep, with_kwargs=True)
    got, want = run(key, model), run(key, base)
    rows = batch["attention_mask"].bool() if key != "bert_cls" else torch.ones(3, dtype=torch.bool)
    near(got[rows], want[rows], run(key, zoo.build(key))[rows])


def test_lst_in_an_encoder_decoder_looks_at_the_encoder() -> None:
    model, adapter = shaken("t5", "lst", reduction=4)
    decoder, encoder = (next(d for _, s, d in adapter.entries if s.tower == t) for t in ("decoder", "encoder"))
    base: Any = zoo.build("t5")
    batch = zoo.batch("t5")
    mask = batch["attention_mask"]
    seen = torch.zeros(mask.shape).masked_fill(mask == 0, -1e9)[:, None, None]
    names = ("encoder", "decoder")
    taps: dict[str, list[Tensor]] = {n: [] for n in names}
    for name, i in ((n, i) for n in names for i in range(zoo.LAYERS)):

        def keep(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name, i: int = i) -> Any:
            taps[name].extend([args[0]] * (i == 0) + [out[0]])
            if i < zoo.LAYERS - 1:
                return out
            if name == "encoder":
                return out[0] + ladder(encoder, taps[name], blocked(mask, False)), *out[1:]
            causal = blocked(torch.ones(args[0].shape[:2]), True)
            encoded = kwargs.get("encoder_hidden_states", args[3] if len(args) > 3 else None)
            return out[0] + ladder(decoder, taps[name], causal, (encoded, seen)), *out[1:]

        base.get_submodule(f"{name}.block.{i}").register_forward_hook(keep, with_kwargs=True)
    near(run("t5", model), run("t5", base), run("t5", zoo.build("t5")))


@pytest.mark.parametrize(("method", "kept"), [("lst", False), ("ia3", True)])
def test_lst_saves_nothing_of_the_base_for_the_backward_pass(method: str, kept: bool) -> None:
    model, adapter = shaken("llama", method)
    shapes: set[tuple[int, ...]] = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.add(tuple(t.shape)), t)[1], lambda t: t):
        loss = model.train()(**zoo.batch("llama")).loss
    assert ((3, zoo.LENGTH, zoo.INNER) in shapes) == kept  # activations inside the base's FFN
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


# --- generation -----------------------------------------------------------------------------------------------------

GENERATING = [("prefix_tuning", {"length": 3}), ("prompt_tuning", {"length": 3}), ("llama_adapter", {"length": 3})]
GENERATING += [("lst", {"reduction": 4}), ("ia3", {}), ("houlsby", {"size": 4}), ("parallel_adapter", {"size": 4})]


@pytest.mark.parametrize("key", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(("method", "fields"), GENERATING)
def test_generation_with_a_cache_equals_generation_without(method: str, fields: dict[str, Any], key: str) -> None:
    model: Any
    model, _ = shaken(key, method, **fields)
    batch = zoo.batch(key)
    inputs = {k: batch[k].flip(1) if key != "t5" else batch[k] for k in ("input_ids", "attention_mask")}  # left padded
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = [model.generate(**inputs, **options, use_cache=c, eos_token_id=None) for c in (True, False)]
    assert torch.equal(made[0].sequences, made[1].sequences)
    near(torch.stack(made[0].logits), torch.stack(made[1].logits))
    if key == "llama":  # and equal to one pass over the whole text
        mask = functional.pad(inputs["attention_mask"], (0, 6), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = model(input_ids=made[0].sequences, attention_mask=mask, position_ids=positions).logits
        near(whole[:, -7:-1], torch.stack(made[0].logits, 1))
