"""What `save_pretrained` of an adapted model writes, also for a plain Trainer's checkpoints and for hubs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peftree.adapter import Adapter, Record, adapters, record_of
from peftree.deltas.packed import dense, is_packed
from peftree.store.build import bare


def unpacked(model: nn.Module) -> Any:
    """Return the base model without adapters and with plain weights, in the dtype of its others; it shares those."""
    plain: Any = bare(model)
    dtype = next(p.dtype for p in plain.parameters() if p.is_floating_point() and not is_packed(p))
    for module in plain.modules():
        held = module._parameters
        if is_packed(held.get("weight")) or type(module).__module__.startswith("bitsandbytes."):
            made: dict[str, Any] = {
                k: None if p is None else dense(module, p).detach().to(dtype) for k, p in held.items()
            }
            module.__class__ = module.__dict__.get("source_cls", nn.Linear)
            if module.__class__ is Conv1D:  # which transformers had turned round
                module.__dict__.update(nf=module.out_features, nx=module.in_features)
                made["weight"] = made["weight"].t().contiguous()
            module._parameters = {k: None if t is None else nn.Parameter(t, False) for k, t in made.items()}
    plain.config = copy.deepcopy(plain.config)
    vars(plain.config).pop("quantization_config", None)
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        plain.__dict__.pop(name, None)
    return plain


def save_whole(plain: Any, folder: Path, **more: Any) -> None:
    """Save a model without adapters as it is: transformers would pack again what it unpacked on reading, or fail."""
    rules = plain.__dict__.get("_weight_conversions") or ()
    if any(getattr(step, "hf_quantizer", None) for rule in rules for step in getattr(rule, "operations", ())):
        del plain.__dict__["_weight_conversions"]
    plain.save_pretrained(folder, **more)


def install(save: Callable[[Adapter, Path], Any]) -> None:
    """Let `save_pretrained` of adapted models write adapters with `save`."""

    def write(model: nn.Module, folder: Any, asked: dict[str, Any]) -> None:
        """Write the adapter, or each of several to its own folder; write a merged model as a whole, without adapters.

        For a Trainer (it passes `state_dict`) also write the adapters' tensors by their names in the model, to the file
        that it resumes from.
        """
        path = Path(folder)
        if record_of(model).merged:
            save_whole(bare(model), path, **{k: v for k, v in asked.items() if k != "state_dict"})
            return
        if not asked.get("is_main_process", True):
            return
        ours = adapters(model)
        for name, adapter in ours.items():
            save(adapter, path if len(ours) == 1 else path / name)
        if "state_dict" in asked:
            whole = (asked["state_dict"] or model.state_dict()).items()
            mine = {k: v.detach().clone().contiguous() for k, v in whole if ".deltas." in f".{k}"}
            save_file(mine, path / "model.safetensors", {"format": "pt"})

    Record.write = staticmethod(write)
