"""Quantised bases: what the setting `quantize` asks transformers for, and what it needs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from peftree.errors import ConfigError
from peftree.settings import RunConfig
from peftree.sites import task_head

PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_torchao": "torchao", "fp8": "torchao"}


def check_quantized(config: RunConfig) -> None:
    """Raise ConfigError if the package that quantises as the run asks is not installed."""
    package = PACKAGES.get(config.quantize)
    if package is not None and find_spec(package) is None:
        what = f"{config.where('quantize')}quantize: {config.quantize} needs {package}, which is not installed."
        raise ConfigError(what, f"Run: pip install {package}")


def to_pack(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Return the linear maps of a model that a form packs, by path; torchao leaves transposed ones (GPT-2)."""
    kinds = (nn.Linear, Conv1D) if PACKAGES[kind] == "bitsandbytes" else (nn.Linear,)
    plain = left_plain(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and should_convert_module(n, plain)}


def left_plain(model: nn.Module) -> list[str]:
    """Return the paths of the modules that stay as they are, with all in them: heads, and maps that share a weight.

    They are those that transformers leaves by itself, and heads that are new for a task, which it may pack.
    """
    reader: Any = getattr(model, "get_output_embeddings", None)
    head = reader() if reader is not None else None
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    found = [name for name, module in model.named_modules() if module is head and name]
    found += [name.rpartition(".")[0] for name in (*tied, *tied.values())]
    found += [site.path for site in task_head(model)]
    own = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and ".deltas." not in f".{n}."]
    return list(dict.fromkeys(name for name in (*found, *own[-1:]) if name))


def quantization(kind: str, dtype: torch.dtype, plain: list[str]) -> Any:
    """Return transformers' quantisation config.

    NF4 is that of QLoRA (arXiv 2305.14314): blocks of 64 weights, scales quantised once more.

    Args:
        kind: as the setting `quantize` names it.
        dtype: what products with a 4-bit weight are computed in.
        plain: paths of the modules that stay as they are.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=plain,
        )  # fmt: skip
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    form = Int8WeightOnlyConfig() if kind == "int8_torchao" else Float8WeightOnlyConfig()
    return TorchAoConfig(form, modules_to_not_convert=plain)
