"""Additive methods against Hugging Face PEFT or an independent computation; counts, starts and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional

import peftree
import zoo
from methods.tools import Hook, bottleneck, hooked, near, run, shaken

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["bert_cls", "llama", "vit"])
def test_houlsby_is_two_bottlenecks_and_moved_norms(key: str) -> None:
    model, adapter = shaken(key, "houlsby", size=6)
    base, changes = zoo.build(key), {}
    for name, site, delta in adapter.entries:
        if site.kind == "norm":
            norm = base.get_submodule(site.path)
            eps = next(v for k, v in vars(norm).items() if "eps" in k)
            gain = norm.weight + delta.value
            shift = None if getattr(norm, "bias", None) is None else norm.bias + delta.offset

            def normed(x: Tensor, y: Tensor, w: Tensor = gain, b: Tensor | None = shift, e: float = eps) -> Tensor:
                centred = x if b is None else x - x.mean(-1, keepdim=True)
                scaled = centred / (centred.square().mean(-1, keepdim=True) + e).sqrt() * w
                return scaled if b is None else scaled + b

            changes[site.path] = normed
        else:
            assert site.role in name.replace("_", ".") and site.role in ("attn.o", "ffn.down")
            changes[site.path] = lambda x, y, d=delta: y + bottleneck(d, functional.gelu, y)
    near(run(key, model), hooked(key, changes), run(key, base))


def test_houlsby_starts_nearly_unchanged() -> None:
    model = zoo.build("bert_cls")
    want = run("bert_cls", model)
    adapter = peftree.adapt(model, "houlsby", head=False)
    drawn = [d.down for d in adapter.deltas.values() if type(d).__name__ == "Bottleneck"]
    assert all(float(w.detach().abs().max()) <= 2e-3 and 5e-4 < float(w.detach().std()) < 1e-3 for w in drawn)
    near(run("bert_cls", model), want, tolerance=1e-4)
    exact = zoo.build("bert_cls")
    peftree.adapt(exact, "houlsby", head=False, start="zero")
    assert torch.equal(run("bert_cls", exact), want)


@pytest.mark.parametrize(("key", "ends"), [("llama", "mlp"), ("gpt2", "mlp"), ("vit", "mlp")])
def test_parallel_adapter_reads_the_input_of_the_ffn(key: str, ends: str) -> None:
    model, adapter = shaken(key, "parallel_adapter", size=9)
    changes = {s.path: lambda x, y, d=d: y + bottleneck(d, functional.relu, x) for _, s, d in adapter.entries}
    assert all(p.endswith(ends) for p in changes) and {d.scale for d in adapter.deltas.values()} == {4.0}
    near(run(key, model), hooked(key, changes), run(key, zoo.build(key)))


def test_parallel_adapter_spans_two_modules_of_bert() -> None:
    model, adapter = shaken("bert_cls", "parallel_adapter", size=9)
    seen: dict[int, Tensor] = {}
    changes: dict[str, Hook] = {}
    for i, delta in enumerate(adapter.deltas.values()):
        layer = f"bert.encoder.layer.{i}"
        changes[f"{layer}.intermediate"] = lambda x, y, i=i: seen.setdefault(i, x) is None or y
        changes[f"{layer}.output.dense"] = lambda x, y, i=i, d=delta: y + bottleneck(d, functional.relu, seen[i])
    near(run("bert_cls", model), hooked("bert_cls", changes), run("bert_cls", zoo.build("bert_cls")))


@pytest.mark.parametrize("reads", ["residual", "input"])
def test_adaptformer_reads_the_residual_stream(reads: str) -> None:
    model, adapter = shaken("vit", "adaptformer", size=9, reads=reads, scale=0.5)
    seen: dict[int, Tensor] = {}
    changes: dict[str, Hook] = {}
    for i, delta in enumerate(adapter.deltas.values()):
        source = "layernorm_after" if reads == "residual" else "mlp.fc1"
        changes[f"vit.layers.{i}.{source}"] = lambda x, y, i=i: seen.setdefault(i, x) is None or y
        changes[f"vit.layers.{i}.mlp"] = lambda x, y, i=i, d=delta: y + bottleneck(d, functional.relu, seen[i])
    near(run("vit", model), hooked("vit", changes), run("vit", zoo.build("vit")))
    assert not torch.equal(run("vit", model.train()), run("vit", model))  # its own dropout


# --- scaling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "targets", "inner"), [("llama", "k_proj v_proj", "down_proj"), ("t5", "k v", "wo")])
def test_ia3_equals_peft(key: str, targets: str, inner: str) -> None:
    model, adapter = shaken(key, "ia3")
    config = peft.IA3Config(target_modules=[*targets.split(), inner], feedforward_modules=[inner])
    other: Any = peft.get_peft_model(zoo.build(key), config).eval()
    layers = {n: m for n, m in other.base_model.model.named_modules() if isinstance(m, peft.tuners.ia3.layer.IA3Layer)}
    assert {s.path for _, s, _ in adapter.entries} == set(layers)
    for _, site, delta in adapter.entries:
        layers[site.path].ia3_l["default"].data = delta.scale.detach().view_as(layers[site.path].ia3_l["default"])
    want = run(key, other)
    near(run(key, model), want, run(key, zoo.build(key)))
    peftree.merge(model)
    near(run(key, model), want)


def test_ia3_on_fused_projections_and_experts() -> None:
    model, adapter = shaken("gpt2", "ia3")
    changes: dict[str, Hook] = {}
    base = zoo.build("gpt2")
    for i in range(zoo.LAYERS):
        k, v, ff = (d.scale for _, s, d in adapter.entries if s.layer == i)
        all_three = torch.cat([torch.ones(zoo.HIDDEN), k, v])
        changes[f"transformer.h.{i}.attn.c_attn"] = lambda x, y, s=all_three: y * s
        down = base.get_submodule(f"transformer.h.{i}.mlp.c_proj")
        changes[f"transformer.h.{i}.mlp.c_proj"] = lambda x, y, s=ff, m=down: (x * s) @ m.weight + m.bias
    near(run("gpt2", model), hooked("gpt2", changes), run("gpt2", base))
    model, adapter = shaken("mixtral", "ia3")
    before = run("mixtral", model)
    peftree.merge(model)
    near(run("mixtral", model), before, run("mixtral", zoo.build("mixtral")))
    assert any(d.scale.shape == (4, zoo.INNER) for d in adapter.deltas.values())


@pytest.mark.parametrize("key", ["vit", "llama", "convnext"])
def test_ssf_scales_and_shifts_every_output(key: str) -> None:
    model, adapter = shaken(key, "ssf")
    changes: dict[str, Hook] = {}
    for _, site, delta in adapter.entries:
        g, b = delta.scale, 0.0 if delta.shift is None else delta.shift
        assert (delta.shift is None) == (key == "llama" and site.kind == "norm")

        def change(x: Tensor, y: Tensor, g: Tensor = g, b: Any = b) -> Tensor:
            if y.dim() == 4 and y.shape[-1] != len(g):  # [batch, channels, height, width]
                return (y.transpose(1, -1) * g + b).transpose(1, -1)
            return y * g + b

        changes[site.path] = change
    want = hooked(key, changes)
    near(run(key, model), want, run(key, zoo.build(key)))
    peftree.merge(model)
    near(run(key, model), want)


def test_ssf_start() -> None:
    deltas = peftree.adapt(zoo.build("vit"), "ssf", head=False).deltas.values()
    for name, mean in (("scale", 1.0), ("shift", 0.0)):
        drawn = torch.cat([getattr(d, name).detach() for d in deltas])
        assert abs(float(drawn.mean()) - mean) < 3e-3 and abs(float(drawn.std()) - 0.02) < 2e-3
    model = zoo.build("vit")
    want = run("vit", model)
    peftree.adapt(model, "ssf", head=False, start="identity")
    near(run("vit", model), want, tolerance=1e-6)


# --- counts, starts and gradients -----------------------------------------------------------------------------------

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LLAMA = {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8}
LLAMA |= {"intermediate_size": 8192, "vocab_size": 128256, "head_dim": 128, "tie_word_embeddings": True}
T0 = {"d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**BASE)),
    "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**BASE), add_pooling_layer=False),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**BASE), add_pooling_layer=False),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "t0": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T0)),
}
W, H, D = 96, 12, 768  # LST on ViT-B: 12 heads of 8 in a width of 96
LADDER = 12 * (4 * W * W + 8 * W * W + 2 * W) + 13 * (D * W + W) + 12 + W + D * W + D
COUNTS: list[tuple[str, dict[str, Any], str, int]] = [
    ("houlsby", {}, "bert", 2_379_264 + 25 * 2 * 768),
    ("houlsby", {"sites": "attn.o ffn.down"}, "bert", 2_379_264),
    ("pfeiffer", {}, "bert", 894_528),
    ("parallel_adapter", {}, "bert", 12 * (2 * 768 * 512 + 512 + 768)),
    ("adaptformer", {}, "vit", 1_189_632),
    ("adaptformer", {"size": 8}, "vit", 156_768),
    ("ia3", {}, "llama", 286_720),
    ("ia3", {}, "t0", 540_672),
    ("ssf", {}, "vit", 205_824),
    ("prefix_tuning", {"length": 50}, "llama", 2_867_200),
    ("prefix_tuning", {"length": 200}, "llama", 11_468_800),
    ("prefix_tuning", {"length": 20}, "roberta", 368_640),
    ("prefix_tuning", {"length": 20, "hidden": 512}, "roberta", 20 * 768 + 512 * 769 + 12 * 513 * 2 * 768),
    ("prompt_tuning", {"length": 200}, "llama", 614_400),
    ("llama_adapter", {"length": 100}, "llama", 8_601_628),
    ("vpt", {"length": 10, "deep": False}, "vit", 7_680),
    ("vpt", {"length": 10}, "vit", 92_160),
    ("lst", {}, "vit", LADDER),
]


@pytest.fixture(scope="module")
def meta() -> Callable[[str], nn.Module]:
    """Return full-size models on the meta device, each built once."""
    made: dict[str, nn.Module] = {}

    def build(key: str) -> nn.Module:
        if key not in made:
            with torch.device("meta"):
                made[key] = MODELS[key]()
        return made[key]

    return build


@pytest.mark.parametrize(("method", "fields", "key", "count"), COUNTS)
def test_counts(method: str, fields: dict[str, Any], key: str, count: int, meta: Callable[[str], nn.Module]) -> None:
    adapter = peftree.adapt(meta(key), method, head=False, **fields)
    try:
        assert sum(p.numel() for p in adapter.parameters()) == count
    finally:
        peftree.detach(meta(key))


IDENTITY = {"parallel_adapter", "adaptformer", "llama_adapter", "ia3", "lst"}
OTHERS = {"houlsby", "ssf", "prefix_tuning", "prompt_tuning"}


@pytest.mark.parametrize("method", sorted(IDENTITY | OTHERS))
@pytest.mark.parametrize("key", ["gpt2", "bart"])
def test_start_and_gradients(method: str, key: str) -> None:
    model = zoo.build(key)
    want = run(key, model)
    adapter = peftree.adapt(model, method, head=False)
    assert (method in IDENTITY) == peftree.get(method).tags.identity_at_init
    if method in IDENTITY:
        near(run(key, model), want, tolerance=1e-6)
    else:
        assert not torch.equal(run(key, model), want)
    for parameter in adapter.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    before = copy.deepcopy({k: v for k, v in model.state_dict().items() if "deltas" not in k})
    zoo.loss(key, model.train()(**zoo.batch(key))).backward()
    dead = [k for k, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    # a constant added to every key of a softmax changes nothing: the offsets of bias-free keys stay without gradient
    assert not [k for k in dead if "attn_k" not in k or not k.endswith("shift")]
    torch.optim.SGD(adapter.parameters(), 0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "deltas" not in k)


def test_the_towers_of_uniadapter_start_apart() -> None:
    """U and c at 0 for text, as `nn.Linear` draws them for images; D as `nn.Linear`, one for both."""
    adapter = peftree.adapt(zoo.build("clip"), "uniadapter", size=25, head=False)
    towers = {site.tower for _, site, _ in adapter.entries}
    assert towers == {"text", "vision"}
    for _, site, delta in adapter.entries:
        if site.tower == "text":
            assert not delta.U.any() and not delta.c.any()
            continue
        for p in (delta.U, delta.c):
            assert 0.7 / 5 < float(p.detach().abs().max()) <= 1 / 5
        assert float(delta.U.detach().std()) == pytest.approx(1 / 5 / 3**0.5, rel=0.1)
