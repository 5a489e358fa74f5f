"""Quantised bases: what the setting `quantize` asks transformers for, and what it needs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from peftree.errors import ConfigError
from peftree.settings import RunConfig
from peftree.sites import task_head

FORMS = ("bitsandbytes", "torchao", "compressed-tensors", "fp8")  # of folders that are packed already
_TORCHAO = {"Int8WeightOnlyConfig": "int8_torchao", "Float8WeightOnlyConfig": "fp8"}  # others have no backward pass
PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8_torchao": "torchao", "fp8": "torchao"}


def check_quantized(config: RunConfig) -> None:
    """Raise ConfigError if the package that quantises as the run asks is not installed."""
    package = PACKAGES.get(config.quantize)
    if package is not None and find_spec(package) is None:
        what = f"{config.where('quantize')}quantize: {config.quantize} needs {package}, which is not installed."
        raise ConfigError(what, f"Run: pip install {package}")


def packing(config: Any) -> dict[str, Any]:
    """Return what a model's config says of its packed weights; empty if they are plain."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(decoder=True), "quantization_config", None)
    return dict(found if isinstance(found, dict) else found.to_dict()) if found else {}


def form_of_files(config: Any, asked: str = "none") -> str:
    """Return the form in which a model's files are kept, named as `quantize` names it; 4 bits: nf4.

    `none`: they are plain, or are unpacked while they are read (compressed-tensors, and fp8 in blocks).

    Args:
        config: the model's.
        asked: what `quantize` asks for.

    Raises:
        ConfigError: they are packed and are to be packed again, or are packed in a way that cannot be trained on, or
            its package is not installed.
    """
    own, which = packing(config), config.name_or_path or "The model"
    kind = own.get("quant_method")
    kind = str(getattr(kind, "value", kind))
    ao = str((own.get("quant_type") or {}).get("default", {}).get("_type")) if kind == "torchao" else ""
    if own and (kind not in FORMS or (ao and ao not in _TORCHAO)):
        what = f"{which} is packed with {' '.join(filter(None, (kind, ao)))}, which cannot be trained on."
        fix = (
            f"Name its plain model, and set quantize. Known: {', '.join(FORMS)} (of torchao: {' and '.join(_TORCHAO)})."
        )
        raise ConfigError(what, fix)
    if own and asked != "none":
        what = f"quantize={asked}: {which} is quantised already ({kind})."
        raise ConfigError(what, "Leave quantize out; it is used as it is.")
    package = kind.replace("-", "_")
    if own and kind != "fp8" and find_spec(package) is None:
        what = f"{which} is packed with {kind}, which is not installed."
        raise ConfigError(what, f"Run: pip install {kind}")
    if kind == "bitsandbytes":
        return "nf4" if own.get("load_in_4bit") else "int8"
    return _TORCHAO.get(ao, "none")


def to_pack(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Return the linear maps of a model that a form packs, by path; torchao leaves transposed ones (GPT-2)."""
    kinds = (nn.Linear, Conv1D) if PACKAGES[kind] == "bitsandbytes" else (nn.Linear,)
    plain = left_plain(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and should_convert_module(n, plain)}


def left_plain(model: nn.Module) -> list[str]:
    """Return the paths of the modules that stay as they are, with all in them: heads, and maps that share a weight.

    They are those that transformers leaves by itself, and heads that are new for a task, which it may pack. Files that
    are packed already say which.
    """
    if held := packing(model.config):
        skipped = held.get("llm_int8_skip_modules") or held.get("modules_to_not_convert")
        return list(skipped or get_keys_to_not_convert(model))
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
