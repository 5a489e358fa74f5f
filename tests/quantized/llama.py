"""Loads a Llama in every form of quantisation, and runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peftree.tasks.quantized import left_plain, quantization

KINDS = ("nf4", "int8", "int8_torchao", "fp8")
Loader = Callable[..., Any]


def saved(folder: Path, width: int) -> Path:
    """Write a Llama of two layers, `width` units wide, into a folder; return the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tokens() -> Tensor:
    """Return two rows of token ids."""
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    """Return the output for `tokens` without a graph, in evaluation mode."""
    with torch.no_grad():
        found: Tensor = model.eval()(tokens()).logits
    return found


def loaded(kind: str, path: Path) -> Any:
    """Return the model in a folder, loaded as users do, with transformers alone; `none`: as it is."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(path))
    packing = None if kind == "none" else quantization(kind, torch.float32, left_plain(empty))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the packages say of themselves
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=packing, dtype=torch.float32)
