"""Quantised bases: what the setting `quantize` asks transformers for, and what it needs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

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


def is_quantised(module: nn.Module, kind: str) -> bool:
    """Return whether a form of quantisation is for this kind of module; torchao's leave transposed maps (GPT-2)."""
    return isinstance(module, nn.Linear) or (isinstance(module, Conv1D) and PACKAGES[kind] == "bitsandbytes")


def left_plain(model: nn.Module) -> list[str]:
    """Return the paths of the modules that stay as they are: heads, tied maps, and the last module.

    They are those that transformers leaves by itself, and heads that are new for a task, which it may pack.
    """
    net: Any = model
    reader = getattr(net, "get_output_embeddings", None)
    head = reader() if reader is not None else None
    tied: dict[str, str] = getattr(net, "all_tied_weights_keys", {})
    own = [name for name, _ in model.named_parameters() if ".deltas." not in f".{name}"]
    last = own[-1].rpartition(".")[0] if own else ""
    found = [name for name, module in model.named_modules() if module is head and name]
    found += [name.removesuffix(".weight") for name in (*tied, *tied.values())]
    return list(dict.fromkeys([*found, last, *(site.path for site in task_head(model))]))


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
