"""Sites: role records as data, models without one, and what is said where neither helps."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
import yaml
from torch import Tensor, nn

import zoo
from peftree import sites
from peftree.errors import SiteError
from peftree.sites import records

TINY = {
    "model_types": ["tiny"],
    "stacks": [{"tower": "text", "layers": "layers", "roles": {"ffn.down": "fc"}}],
}
# Fields without which a type's config does not build a model.
FIELDS = {"ministral": {"head_dim": 128}}
ROUTERS = ("shared_expert_gate", "mlp.router")


@pytest.fixture(autouse=True)
def _no_added_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_ADDED", {})


def _write(folder: Path, data: object) -> Path:
    path = folder / "record.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def _described() -> list[str]:
    return sorted({t for r in records.records().values() if r.stacks for t in r.model_types})


@pytest.mark.parametrize("kind", _described())
def test_every_described_type_has_its_sites(kind: str) -> None:
    """Each model type that a record names, built from its default config, fits that record."""
    config = tf.CONFIG_MAPPING[kind](**FIELDS.get(kind, {}))
    with torch.device("meta"):
        # No auto class makes SigLIP's text tower.
        make = tf.SiglipTextModel if kind == "siglip_text_model" else tf.AutoModel.from_config
        model = make(config)
    found = sites.tree(model)
    record = records.records()[kind]
    roles = Counter(site.role for site in found)
    layout = record.stacks[-1]
    wanted = {role for role in layout.roles if role not in layout.optional}
    wanted |= {"layer"} | ({"attn"} if layout.attn else set())
    assert ("stack" in roles) is not layout.length_first
    wanted |= {"ffn"} if layout.ffn else set()
    assert wanted <= set(roles)
    # Every linear in the layers is some role's, but for the routers of experts.
    layers = [site.path for site in found if site.role == "layer"]
    owned = {site.path for site in found}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(path.startswith(x + ".") for x in layers):
            assert path in owned or path.endswith(ROUTERS), path


def test_variants_within_a_type() -> None:
    """Gated T5, GPT-2 with cross-attention, and OPT with its norms after the sub-layers."""
    gated = tf.T5ForConditionalGeneration(tf.T5Config(**zoo._T5, feed_forward_proj="gated-gelu"))
    gate, up = sites.resolve(gated, "decoder:ffn.gate@0 decoder:ffn.up@0")
    assert [s.path.rpartition(".")[2] for s in (gate, up)] == ["wi_0", "wi_1"]
    wide = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "add_cross_attention": True}
    crossed = tf.GPT2LMHeadModel(tf.GPT2Config(**wide))
    found = sites.resolve(crossed, "xattn.*@0 xattn@0")
    assert {s.role: s.rows for s in found} == {
        "xattn": None, "xattn.q": None, "xattn.k": (0, 32), "xattn.v": (32, 64), "xattn.o": None
    }  # fmt: skip
    late = tf.OPTModel(tf.OPTConfig(**zoo._OPT, do_layer_norm_before=False)).eval()
    seen: dict[str, Tensor] = {}
    ffn = sites.resolve(late, "ffn@0")[0]
    assert ffn.residual is not None and ffn.residual == ffn.source
    layer = late.get_submodule("decoder.layers.0")
    fc1, fc2 = late.get_submodule(ffn.residual), late.get_submodule(ffn.path)
    fc1.register_forward_hook(lambda _, args, out: seen.update(stream=args[0]))
    fc2.register_forward_hook(lambda _, args, out: seen.update(out=out))
    layer.register_forward_hook(lambda _, args, out: seen.update(end=out))
    late(torch.arange(8, 14)[None])
    end = layer.final_layer_norm(seen["stream"] + seen["out"])
    torch.testing.assert_close(end.reshape(seen["end"].shape), seen["end"])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"stack": []}, ["no key 'stack'", "Did you mean 'stacks'", "model_types"]),
        ({"model_types": []}, ["names no model", "model_types or classes"]),
        ({"stacks": [{"tower": "text", "layers": "x", "roles": {"attn.w": "y"}}]},
         ["stacks.0.roles.attn.w='attn.w'"]),
        ({"stacks": [{"tower": "txt", "layers": "x", "roles": {}}]}, ["stacks.0.tower", "'text'"]),
        ({"stacks": [{"tower": "text", "layers": "x",
                      "roles": {"attn.q": {"path": "c", "slice": "1-3"}}}]},
         ["stacks.0.roles.attn.q.0.slice"]),
        ({"stacks": [{"tower": "text", "layers": "x", "roles": {},
                      "ffn": {"in": "a", "output": "b"}}]}, ["stacks.0.ffn.out"]),
    ],
)  # fmt: skip
def test_record_errors_name_file_and_key(tmp_path: Path, change: dict[str, object], parts: list[str]) -> None:
    path = _write(tmp_path, TINY | change)
    with pytest.raises(SiteError) as error:
        sites.register_record(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)
    assert "tiny" not in records.records()


def test_files_that_are_no_records(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"cannot be read: No such file"):
        sites.read_record(tmp_path / "none.yaml")
    with pytest.raises(SiteError, match="is not YAML"):
        sites.read_record(_write(tmp_path, "a: [1"))
    with pytest.raises(SiteError, match="should be a valid dictionary"):
        sites.read_record(_write(tmp_path, "- a"))
    with pytest.raises(SiteError, match="is not YAML"):
        sites.read_record(_write(tmp_path, "!!python/object/apply:os.getcwd []"))


class Odd(nn.Module):
    """A layer whose names tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 24), nn.Linear(8, 8)
        self.in_, self.out_ = nn.Linear(8, 16), nn.Linear(16, 8)


class OddModel(nn.Module):
    """A stack of such layers, without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Odd() for _ in range(3))
        self.top = nn.Linear(8, 2)


def test_a_user_record_describes_a_class(tmp_path: Path) -> None:
    model = nn.Sequential(OddModel())
    with pytest.raises(SiteError, match="'Sequential' is not known: it has no role record"):
        sites.resolve(model, "attn.q")
    record = {
        "classes": ["OddModel"],
        "stacks": [
            {
                "tower": "vision",
                "layers": "steps",
                "roles": {
                    "attn.q": {"path": "one", "slice": "0/3"},
                    "attn.o": "two",
                    "ffn.up": "in_",
                    "ffn.down": "out_",
                },
            }
        ],
    }
    sites.register_record(_write(tmp_path, record))
    found = sites.resolve(model, "attn.q@-1 ffn.up@0")
    assert [site.path for site in found] == ["0.steps.0.in_", "0.steps.2.one"]
    assert found[1].rows == (0, 8)
    record["stacks"][0]["roles"]["attn.q"]["slice"] = "0/5"  # type: ignore[index]
    sites.register_record(_write(tmp_path, record))
    with pytest.raises(SiteError, match="24 rows has no part '0/5'"):
        sites.resolve(model, "attn.q")
    record["stacks"][0]["roles"]["ffn.gate"] = "gate"  # type: ignore[index]
    sites.register_record(_write(tmp_path, record))
    with pytest.raises(SiteError, match=r"not match its role record: .* without ffn.gate \(gate\)"):
        sites.resolve(model, "attn.q")


def test_an_added_record_goes_before_ours(tmp_path: Path) -> None:
    data = yaml.safe_load((records.FOLDER / "llama.yaml").read_text())
    data["model_types"], data["stacks"][0]["tower"] = ["llama"], "decoder"
    sites.register_record(_write(tmp_path, data))
    assert {s.tower for s in sites.tree(zoo.build("llama"))} == {"decoder"}
    assert {s.tower for s in sites.tree(zoo.build("qwen2"))} == {"text"}


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    point = SimpleNamespace(name="extra", value="extra.roles", load=lambda: module)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    load = records._packaged.__wrapped__
    _write(tmp_path, TINY)
    assert "tiny" in load() and "llama" in load()
    path = _write(tmp_path, TINY | {"model_types": ["llama"]})
    with pytest.raises(SiteError, match="both describe 'llama'") as error:
        load()
    assert str(path) in str(error.value) and "llama.yaml" in str(error.value)
    point.load = lambda: SimpleNamespace()
    with pytest.raises(SiteError, match=r"'extra' \(extra.roles\) does not load"):
        load()


# --- models without a record


class Attention(nn.Module):
    """Fused attention as timm writes it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class Mlp(nn.Module):
    """A feed-forward network."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 40), nn.Linear(40, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both linears."""
        out: Tensor = self.fc2(self.fc1(x))
        return out


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(16), Attention()
        self.norm2, self.mlp = nn.LayerNorm(16), Mlp()


class Plain(nn.Module):
    """A vision transformer without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)


def test_inference_of_a_plain_vision_transformer() -> None:
    model = Plain()
    counts = Counter(s.role for s in sites.tree(model))
    assert counts == {
        "stack": 1, "layer": 3, "attn": 3, "ffn": 3, "attn.q": 3, "attn.k": 3, "attn.v": 3,
        "attn.o": 3, "ffn.up": 3, "ffn.down": 3, "norm": 7, "conv": 1, "head": 1,
    }  # fmt: skip
    assert {s.tower for s in sites.tree(model)} == {"vision"}
    assert [s.rows for s in sites.resolve(model, "attn.*@1")] == [
        (0, 16), (16, 32), (32, 48), None
    ]  # fmt: skip
    attn, ffn = sites.resolve(model, "attn@2 ffn@2")
    assert (attn.heads, attn.head_dim, attn.residual) == (4, 4, None)
    assert (ffn.source, ffn.path, ffn.residual) == ("blocks.2.mlp", "blocks.2.mlp", None)
    assert [s.path for s in sites.task_head(model)] == ["head"]


def test_inference_without_a_record_equals_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llama")
    own = [s for s in sites.tree(model) if s.kind in ("linear", "norm", "embedding", "layer")]
    monkeypatch.setattr("peftree.sites.stacks.records", dict)
    assert [s for s in sites.tree(model) if s.kind in ("linear", "norm", "embedding", "layer")] == own


def test_what_is_not_clear_is_not_guessed() -> None:
    two = nn.ModuleDict({"a": Plain(), "b": Plain()})
    assert [s.path for s in sites.tree(two) if s.role == "stack"] == ["a", "b"]
    extra = Plain()
    for block in extra.blocks:
        block.adaptor = nn.Linear(16, 16)  # type: ignore[assignment]
    assert [s.role for s in sites.resolve(extra, "adaptor@0")] == ["linear"]
    assert len(sites.resolve(extra, "linear@0")) == 7 and len(sites.resolve(extra, "ffn")) == 3
    with pytest.raises(SiteError, match="no list of layers whose attention"):
        sites.resolve(nn.Linear(3, 3), "stack")


def test_parts_of_an_unknown_composite_are_no_heads() -> None:
    """A known text tower in an unknown model: the rest is a connector, never a task's head."""
    model = zoo.build("llava")
    model.config.model_type = model.model.config.model_type = "llava_of_tomorrow"
    found = sites.tree(model)
    assert [s.path for s in found if s.role == "head"] == ["lm_head"]
    assert len([s for s in found if s.tower == "connector"]) == 2
    assert {s.tower for s in sites.resolve(model, "attn.q")} == {"text"}
    assert sites.task_head(model) == []
