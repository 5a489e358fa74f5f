"""Sites in every family: counts, widths, fused slices, branches, heads, shapes alone."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import zoo
from peftree import sites
from peftree.errors import SiteError
from peftree.sites import Site

H, KV, INNER, VOCAB = 32, 16, 48, 64  # the zoo's hidden size, grouped key width, inner, vocabulary

# Counts and widths [in, out] by hand from the configs of the zoo: two layers a stack.
GATED = {
    "attn.q": (2, H, H), "attn.k": (2, H, KV), "attn.v": (2, H, KV), "attn.o": (2, H, H),
    "ffn.gate": (2, H, INNER), "ffn.up": (2, H, INNER), "ffn.down": (2, INNER, H),
    "attn": (2, H, H), "ffn": (2, H, H), "layer": (2, H, H), "stack": (1, H, H),
    "embed": (1, VOCAB, H), "head": (1, H, VOCAB), "norm": 5,
}  # fmt: skip
PLAIN = {
    "attn.q": (2, H, H), "attn.k": (2, H, H), "attn.v": (2, H, H), "attn.o": (2, H, H),
    "ffn.up": (2, H, INNER), "ffn.down": (2, INNER, H), "attn": (2, H, H), "ffn": (2, H, H),
    "layer": (2, H, H), "stack": (1, H, H), "norm": 5,
}  # fmt: skip
CROSS = {f"xattn{part}": (2, H, H) for part in ("", ".q", ".k", ".v", ".o")} | {"norm": 7}
LM = {"embed": (1, VOCAB, H), "head": (1, H, VOCAB)}
BERT = PLAIN | {"embed": (1, VOCAB, H), "embed.position": (1, 40, H), "embed.type": (1, 2, H)}
PATCH = {"conv": (1, 3 * 8 * 8, H)}
CLIP_TEXT = PLAIN | {"embed": (1, VOCAB, H), "embed.position": (1, 16, H)}
CLIP_VISION = PLAIN | PATCH | {"embed.position": (1, 5, H), "norm": 6}
SIGLIP_VISION = PLAIN | PATCH | {"embed.position": (1, 4, H)}
TEXT_OF_VLM = {"text": GATED}
EXPECTED: dict[str, dict[str, dict[str, Any]]] = {
    **{name: {"text": GATED} for name in ("llama", "qwen2", "mistral", "phi3", "gemma", "mixtral")},
    "qwen3": {"text": GATED | {"norm": 9}},
    "gemma2": {"text": GATED | {"norm": 9}},
    "gemma3": {"text": GATED | {"norm": 13}},
    "qwen3_moe": {
        "text": GATED
        | {"norm": 9, "ffn.gate": (2, H, 24), "ffn.up": (2, H, 24), "ffn.down": (2, 24, H)}
    },
    "gpt2": {"text": PLAIN | LM | {"embed.position": (1, 40, H)}},
    "gpt_neox": {
        "text": {k: v for k, v in PLAIN.items() if k not in ("attn.q", "attn.k", "attn.v")}
        | LM
        | {"attn.qkv": (2, H, 3 * H)}
    },
    "opt": {"text": PLAIN | LM | {"embed.position": (1, 66, H)}},
    "bert": {"text": BERT},
    "bert_cls": {"text": BERT | {"head": (1, H, 3)}},
    "roberta": {"text": BERT | {"head": 2}},
    "distilbert": {"text": {k: v for k, v in BERT.items() if k != "embed.type"} | {"head": 2}},
    "t5": {
        "encoder": PLAIN | {"embed": (1, VOCAB, H)},
        "decoder": PLAIN | CROSS | LM,
    },
    "bart": {
        "encoder": PLAIN | {"embed": (1, VOCAB, H), "embed.position": (1, 42, H)},
        "decoder": PLAIN | CROSS | LM | {"embed.position": (1, 42, H)},
    },
    "whisper": {
        "encoder": PLAIN | {"embed.position": (1, 10, H)},
        "decoder": PLAIN | CROSS | LM | {"embed.position": (1, 40, H)},
    },
    "vit": {"vision": PLAIN | PATCH | {"head": (1, H, 3)}},
    "deit": {"vision": PLAIN | PATCH | {"head": (1, H, 3)}},
    "dinov2": {
        "vision": PLAIN
        | PATCH
        | {"head": (1, 2 * H, 3), "ffn.up": (2, H, 2 * H), "ffn.down": (2, 2 * H, H)}
    },
    # two stages of two blocks, 16 then 32 wide; norms: 8 in blocks, patches, merging, last
    "swin": {
        "vision": {"stack": (1, 16, 32), "conv": (1, 12, 16), "norm": 11, "head": (1, 32, 3)}
        | dict.fromkeys(
            "layer attn ffn attn.q attn.k attn.v attn.o ffn.up ffn.down".split(), 4
        )
    },
    # stages of 1 and 2 layers; conv: patches, downsampling, one a layer
    "convnext": {
        "vision": {"stack": (1, 16, 32), "conv": 5, "norm": 6, "head": (1, 32, 3)}
        | dict.fromkeys("layer ffn.up ffn.down".split(), 3)
    },
    # stem, two a layer, a shortcut in the first layer of both stages
    "resnet": {
        "vision": {"stack": (1, 8, 32), "conv": 9, "norm": 9, "head": (1, 32, 3), "layer": 3}
    },
    "clip": {
        "text": CLIP_TEXT | {"head": (1, H, 24)},
        "vision": CLIP_VISION | {"head": (1, H, 24)},
    },
    "siglip": {"text": CLIP_TEXT, "vision": SIGLIP_VISION},
    "dual": {
        "vision": PLAIN | PATCH | {"head": (1, H, 24)},
        "text": BERT | {"head": (1, H, 24)},
    },
    "llava": TEXT_OF_VLM | {"vision": CLIP_VISION, "connector": {"linear": (2, H, H)}},
    "idefics3": TEXT_OF_VLM | {"vision": SIGLIP_VISION, "connector": {"linear": (1, 4 * H, H)}},
    "smolvlm": TEXT_OF_VLM | {"vision": SIGLIP_VISION, "connector": {"linear": (1, 4 * H, H)}},
}  # fmt: skip
# Parameters inside layers that no site owns, by the last parts of their names.
UNOWNED = (
    "relative_attention_bias.weight", "relative_position_bias_table", "mlp.gate.weight",
    "layer_scale1.lambda1", "layer_scale2.lambda1", "layer_scale_parameter",
)  # fmt: skip


@pytest.mark.parametrize("name", zoo.ZOO)
def test_roles_counts_and_widths(name: str) -> None:
    found = sites.tree(zoo.build(name))
    counts = Counter((site.tower, site.role) for site in found)
    expected = {
        (tower, role): value if isinstance(value, int) else value[0]
        for tower, roles in EXPECTED[name].items()
        for role, value in roles.items()
    }
    assert counts == expected
    for site in found:
        value = EXPECTED[name][site.tower][site.role]
        if not isinstance(value, int):
            assert (site.in_features, site.out_features) == value[1:], site


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_parameter_of_a_layer_is_owned_once(name: str) -> None:
    model = zoo.build(name)
    found = sites.tree(model)
    layers = [path for site in found if site.role == "stack" for path in site.layers]
    for path, parameter in model.named_parameters():
        if not any(path.startswith(layer + ".") for layer in layers) or path.endswith(UNOWNED):
            continue
        owner, _, leaf = path.rpartition(".")
        mine = [s for s in found if s.path == owner and leaf in (s.parameter, s.bias)]
        mine = [s for s in mine if s.kind not in ("branch", "attention", "layer", "stack")]
        assert mine, f"nothing owns {path}"
        # A fused weight is tiled by its slices: no gap, no overlap.
        axis = 1 if mine[0].kind in ("conv1d", "expert") and parameter.ndim > 1 else 0
        pieces = sorted(site.rows or (0, parameter.shape[axis]) for site in mine)
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == parameter.shape[axis]


def run(name: str, model: nn.Module) -> dict[str, list[tuple[Any, Any]]]:
    """Run the model on a batch and return (first input, output) of every call by module path."""
    seen: dict[str, list[tuple[Any, Any]]] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, args: Any, named: Any, out: Any) -> None:
            first = args[0] if args else named.get("hidden_states")
            seen.setdefault(path, []).append((first, out[0] if isinstance(out, tuple) else out))

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(keep(path), with_kwargs=True)
    with torch.no_grad():
        model(**zoo.batch(name))
    return seen


POST = ("bert", "bert_cls", "roberta", "distilbert", "bart", "dual")
SANDWICH = ("gemma2", "gemma3")


@pytest.mark.parametrize("name", [n for n in zoo.ZOO if n not in ("convnext", "resnet")])
def test_a_branch_lies_where_its_sublayer_does(name: str) -> None:
    model = zoo.build(name)
    found = sites.tree(model)
    seen = run(name, model)
    parts = [site for site in found if site.role in ("attn", "xattn", "ffn")]
    assert parts
    for site in parts:
        assert site.source is not None and site.residual is not None
        out = seen[site.path if site.role == "ffn" else (site.project or ("",))[-1]][0][1]
        stream, source = seen[site.residual][0][0], seen[site.source][0][0]
        if site.residual != site.source:
            source_is = seen[site.residual][0][1]  # pre-norm: the norm of the stream
            assert torch.equal(source.reshape(source_is.shape), source_is) or name == "swin"
        layer = next(
            path
            for top in found
            if top.role == "stack" and top.tower == site.tower
            for path in top.layers
            if site.path.startswith(path + ".")
        )
        if site.role == "attn":
            assert torch.equal(stream, seen[layer][0][0])
        if site.role == "ffn":
            _same_as_the_layer(name, model, site, layer, stream + out, seen[layer][0][1], out)


def _same_as_the_layer(
    name: str, model: nn.Module, site: Site, layer: str, added: Tensor, end: Tensor, out: Tensor
) -> None:
    """Check stream + branch output (normed or scaled as the family does) against the layer."""
    added = added.reshape(end.shape)
    if name in SANDWICH:
        added = added - out + model.get_submodule(f"{layer}.post_feedforward_layernorm")(out)
    elif name == "dinov2":
        added = added - out + model.get_submodule(f"{layer}.layer_scale2")(out)
    elif name == "gpt_neox":  # attention and feed-forward network side by side
        return
    elif name in POST and site.tower != "vision":
        norms = {"distilbert": "output_layer_norm", "bart": "final_layer_norm"}
        added = model.get_submodule(f"{layer}.{norms.get(name, 'output.LayerNorm')}")(added)
    torch.testing.assert_close(added, end, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_norm_offset_is_what_the_module_does(name: str) -> None:
    model = zoo.build(name)
    found = [site for site in sites.tree(model) if site.role == "norm"]
    assert all(site.unit_offset == name.startswith("gemma") for site in found)
    for site in found:
        module = model.get_submodule(site.path)
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
        first = getattr(module, "data_format", "") == "channels_first"
        image = first or isinstance(module, nn.BatchNorm2d)
        x = torch.randn(2, site.in_features, *([3, 3] if image else []))
        assert bool(module(x).abs().sum() > 0) == site.unit_offset


def test_attention_facts() -> None:
    for name in ("llama", "phi3"):
        top, attn = sites.resolve(zoo.build(name), "stack attn@0")
        for site in (top, attn):
            assert (site.heads, site.kv_heads, site.head_dim, site.causal) == (4, 2, 8, True)
    assert attn.project == tuple(f"model.layers.0.self_attn.{x}_proj" for x in ("qkv", "qkv", "qkv", "o"))
    neox = sites.resolve(zoo.build("gpt_neox"), "attn@0")[0]
    assert (neox.heads, neox.kv_heads, neox.head_dim) == (4, 4, 8)
    swin = sites.resolve(zoo.build("swin"), "attn")
    assert [(s.heads, s.head_dim) for s in swin] == [(2, 8), (2, 8), (4, 8), (4, 8)]
    t5 = sites.resolve(zoo.build("t5"), "attn@0 xattn@0")
    assert [(s.tower, s.causal, s.cross) for s in t5] == [
        ("encoder", False, False), ("decoder", True, False), ("decoder", False, True)
    ]  # fmt: skip
    clip = sites.resolve(zoo.build("clip"), "attn@0")
    assert [(s.tower, s.causal) for s in clip] == [("text", True), ("vision", False)]
    decoder = tf.BertConfig(**zoo.BERT, is_decoder=True, add_cross_attention=True)
    with torch.device("meta"):
        found = sites.resolve(tf.BertLMHeadModel(decoder), "attn xattn xattn.q")
    assert Counter(s.role for s in found) == {"attn": 2, "xattn": 2, "xattn.q": 2}
    assert all(s.causal == (s.role == "attn") for s in found)


def test_a_fused_slice_computes_its_part() -> None:
    """The rows of phi3's fused weight give q, k, v as its attention splits them."""
    model = zoo.build("phi3")
    q, k, v = sites.resolve(model, "attn.q@0 attn.k@0 attn.v@0")
    assert [s.rows for s in (q, k, v)] == [(0, 32), (32, 48), (48, 64)]
    gate, up = sites.resolve(model, "ffn.gate@0 ffn.up@0")
    mlp = model.get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 3, H)
    with torch.no_grad():
        weight = mlp.gate_up_proj.weight
        inner = [x @ weight[slice(*site.rows or ())].T for site in (gate, up)]
        expected = mlp.down_proj(mlp.activation_fn(inner[0]) * inner[1])
        torch.testing.assert_close(mlp(x), expected)
    c_attn = zoo.build("gpt2").get_submodule("transformer.h.0.attn.c_attn")
    for site, want in zip(sites.resolve(zoo.build("gpt2"), "attn.*@0")[:3], c_attn(x).split(H, -1), strict=True):
        rows = slice(*site.rows or ())
        torch.testing.assert_close(x @ c_attn.weight[:, rows] + c_attn.bias[rows], want)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_stack_embedding_feeds_the_first_layer(name: str) -> None:
    model = zoo.build(name)
    seen = run(name, model)
    for top in (s for s in sites.tree(model) if s.role == "stack"):
        kind = type(model.get_submodule(top.path)).__name__
        if top.tower == "vision":
            assert top.embed is not None
            assert torch.equal(seen[top.embed][0][1], seen[top.layers[0]][0][0]), kind
        elif kind == "WhisperEncoder":
            assert top.embed is None
        else:
            assert isinstance(model.get_submodule(top.embed or ""), nn.Embedding), kind


@pytest.mark.parametrize(
    ("model", "config", "fields", "paths"),
    [
        ("LlamaForSequenceClassification", "LlamaConfig", zoo.LLAMA, ["score"]),
        ("LlamaForCausalLM", "LlamaConfig", zoo.LLAMA, []),
        ("LlamaModel", "LlamaConfig", zoo.LLAMA, []),
        ("BertForMaskedLM", "BertConfig", zoo.BERT, []),
        ("BertForPreTraining", "BertConfig", zoo.BERT, []),
        ("BertForTokenClassification", "BertConfig", zoo.BERT, ["classifier"]),
        ("BertForQuestionAnswering", "BertConfig", zoo.BERT, ["qa_outputs"]),
        ("RobertaForMaskedLM", "RobertaConfig", zoo.BERT, []),
        ("ElectraForSequenceClassification", "ElectraConfig", zoo.BERT,
         ["classifier.dense", "classifier.out_proj"]),
        ("BartForSequenceClassification", "BartConfig", zoo.BART,
         ["classification_head.dense", "classification_head.out_proj"]),
        ("T5ForTokenClassification", "T5Config", zoo._T5, ["classifier"]),
        ("ViTModel", "ViTConfig", zoo.VIT, []),
        ("CLIPModel", "CLIPConfig", {}, []),
        ("CLIPForImageClassification", "CLIPConfig", {}, ["classifier"]),
        ("WhisperForAudioClassification", "WhisperConfig", zoo._WHISPER,
         ["projector", "classifier"]),
    ],
)  # fmt: skip
def test_task_heads(model: str, config: str, fields: dict[str, Any], paths: list[str]) -> None:
    with torch.device("meta"):
        built = getattr(tf, model)(getattr(tf, config)(**fields))
    found = sites.task_head(built)
    assert [site.path for site in found] == paths
    assert {site.role for site in found} <= {"head"}
    assert sites.resolve(built, "attn.q")


def test_published_counts_on_the_meta_device() -> None:
    """LoRA r=8 on q, v: LLaMA-7B 4,194,304, RoBERTa-base 294,912; BitFit RoBERTa-base 102,144."""
    with torch.device("meta"):
        llama = tf.LlamaForCausalLM(tf.LlamaConfig())
        roberta = tf.RobertaForSequenceClassification(tf.RobertaConfig())
    assert len(sites.resolve(llama, "linear")) == 224
    for model, expected in ((llama, 4_194_304), (roberta, 294_912)):
        found = sites.resolve(model, "attn.q attn.v")
        assert sum(8 * (s.in_features + s.out_features) for s in found) == expected
    assert sum(s.out_features for s in sites.resolve(roberta, "bias")) == 102_144


def test_an_adapted_model_has_the_same_sites() -> None:
    model = zoo.build("gpt2")
    before = sites.tree(model)
    for site in before:
        module = model.get_submodule(site.path)
        if site.role == "module" or "deltas" in module._modules:
            continue
        kind = type(module)
        module.__class__ = type("Adapted" + kind.__name__, (kind,), {})
        module.add_module("deltas", nn.ModuleDict({"a": nn.Linear(3, 3), "norm": nn.LayerNorm(3)}))
    assert sites.tree(model) == before
    with pytest.raises(SiteError):
        sites.resolve(model, "deltas.a")


def test_summary_is_plain_data_and_adds_up() -> None:
    for name in ("gpt2", "phi3", "mixtral", "clip", "resnet"):
        model = zoo.build(name)
        rows = sites.summary(model)
        assert json.loads(json.dumps(rows)) == rows
        owned = {s.path for s in sites.tree(model) if s.kind not in ("layer", "stack", "branch")}
        total = sum(p.numel() for path in owned for p in model.get_submodule(path).parameters(recurse=False))
        assert sum(row["parameters"] for row in rows) == total
    row = next(r for r in sites.summary(zoo.build("gpt2")) if r["role"] == "attn.k")
    assert row == {
        "tower": "text", "role": "attn.k", "kind": "conv1d", "count": 2, "layers": "0-1",
        "shapes": [[32, 32]], "parameters": 2 * (32 * 32 + 32),
    }  # fmt: skip
