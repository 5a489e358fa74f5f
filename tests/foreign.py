"""Small models of other libraries (timm, diffusers, sentence-transformers) and plain torch, with inputs, for tests."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]


class _Anything(type):
    """A class whose attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Absent(ModuleType):
    """A module of a package that is not installed: it has classes of every name, and nothing works."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__.setdefault(name, _Anything(name, (), {}))


class _Names(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@cache
def timm() -> Any:
    """Import timm without torchvision: its models need of it only names that they compare classes with.

    torchvision has no build beside the pinned torch. What stands in for it is gone after the import.
    """
    finder = _Names()
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def _image(name: str, **fields: Any) -> Made:
    model = getattr(timm().models, name)(num_classes=3, **fields)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, lambda m: m(x)


def _diffusion(name: str, *inputs: tuple[int, ...], **fields: Any) -> Made:
    diffusers = importlib.import_module("diffusers")
    draw = torch.Generator().manual_seed(1)
    x, *more = [torch.randn(*shape, generator=draw) for shape in inputs]
    names = ("encoder_hidden_states", "pooled_projections")
    named: dict[str, Any] = dict(zip(names, more, strict=False)) or {"class_labels": torch.tensor([0, 1])}
    return getattr(diffusers, name)(**fields), lambda m: m(x, timestep=torch.tensor([1, 5]), **named).sample


def _unet() -> Made:
    return _diffusion(
        "UNet2DConditionModel", (2, 4, 8, 8), (2, 5, 16), sample_size=8, layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip


def _dit() -> Made:
    return _diffusion(
        "DiTTransformer2DModel", (2, 4, 8, 8), num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip


def _sd3() -> Made:
    return _diffusion(
        "SD3Transformer2DModel", (2, 4, 8, 8), (2, 5, 16), (2, 12), sample_size=8, patch_size=2, in_channels=4,
        num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


def _sentence() -> Made:
    """A sentence-transformers model made of modules: a small BERT, mean pooling, a dense layer."""
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    whole = importlib.import_module("sentence_transformers").SentenceTransformer
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    encoder = _Encoder(tf.BertModel(config))
    model = whole(modules=[encoder, modules.Pooling(32), modules.Dense(32, 16)], device="cpu")
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, lambda m: m(dict(inputs))["sentence_embedding"]


class _Encoder(nn.Module):
    """The first module of a sentence-transformers model, without a tokenizer."""

    def __init__(self, auto_model: nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Add the token embeddings to the features."""
        return features | {"token_embeddings": self.auto_model(**features).last_hidden_state}


def _plain() -> Made:
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    return model, lambda m: m(x)


class _Training(nn.TransformerEncoder):
    """In evaluation torch runs an encoder layer as one fused operation that calls none of its modules."""

    def train(self, mode: bool = True) -> _Training:
        return super().train(True)


def _encoder() -> Made:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = _Training(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    return model, lambda m: m(x)


_SWIN: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
FOREIGN: dict[str, Callable[[], Made]] = {
    "timm resnet": lambda: _image("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)),
    "timm convnext": lambda: _image("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
    "timm swin": lambda: _image("swin_tiny_patch4_window7_224", **_SWIN),
    "timm vit": lambda: _image("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4),
    "timm mixer": lambda: _image("MlpMixer", img_size=32, patch_size=8, embed_dim=32, num_blocks=2),
    "diffusers unet": _unet,
    "diffusers dit": _dit,
    "diffusers sd3": _sd3,
    "sentence-transformers": _sentence,
    "torch sequential": _plain,
    "torch encoder": _encoder,
}

# Sites at which each of them is adapted.
SITES = {
    "timm resnet": "conv", "timm convnext": "linear conv", "timm swin": "linear", "timm vit": "blocks.*.attn.qkv",
    "timm mixer": "linear", "diffusers unet": "*.to_q *.to_v conv_in", "diffusers dit": "linear",
    "diffusers sd3": "linear", "sentence-transformers": "attn.q attn.v", "torch sequential": "0 3",
    "torch encoder": "linear1 linear2",
}  # fmt: skip


def build(name: str) -> Made:
    """Return a small model in eval mode, the same weights each time, and what runs it to one tensor."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model, run = FOREIGN[name]()
        for parameter in model.parameters():  # fresh models start norms at 1 and gates at 0
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    # torch's attention takes another kernel, with other last bits, where weights are frozen: compare frozen ones.
    return model.eval().requires_grad_(False), run
