"""The optimizers that a run can name: those of transformers' Trainer, what they need, and which no run can use."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from peftree.errors import ConfigError, did_you_mean

DEFAULT = "adamw_torch_fused"
# The beginnings of names that no run can use, why, and what to do.
_REFUSED = {
    ("galore_", "apollo_"): ("it chooses weights of the base to train", "method=galore trains with GaLore."),
    ("lomo", "adalomo"): (
        "it changes weights within the backward pass, before anything is checked, at one rate for all", "",
    ),
    ("schedule_free_",): ("the weights that it trains are not those to score and save", ""),
    ("grokadamw",): ("its state is where no checkpoint can save it", ""),
    ("adamw_torch_4bit", "adamw_torch_8bit", "stable_adamw"): ("no checkpoint can hold its state", "Use adamw_8bit."),
    ("adamw_torch_xla", "adamw_torch_npu_fused"): ("it is for other devices", ""),
    ("adamw_anyprecision",): ("its package has no release", ""),
}  # fmt: skip
_EIGHT_BITS = ("adamw_8bit", "adamw_bnb_8bit", "ademamix_8bit", "lion_8bit", "rmsprop_bnb_8bit")
_BNB = ("paged_", "adamw_8bit", "adamw_bnb_8bit", "lion_", "ademamix", "rmsprop_bnb")  # the beginnings of its names


def check_name(name: str, where: str = "") -> None:
    """Raise ConfigError, which starts with `where`, if no run can use an optimizer, with what to do instead."""
    if name == DEFAULT:
        return
    from transformers.training_args import OptimizerNames  # seconds of imports, with transformers' Trainer

    known = [each.value for each in OptimizerNames]
    if name not in known:
        usable = [each for each in known if not _why_not(each)]
        raise ConfigError(f"{where}there is no optimizer '{name}'.", did_you_mean(name, usable, "Optimizers"))
    if why := _why_not(name):
        raise ConfigError(f"{where}optimizer={name} cannot be used: {why[0]}.", why[1] or f"Use {DEFAULT}.")


def check_optimizer(name: str, device: torch.device, where: str = "") -> None:
    """Do as `check_name` does, and raise ConfigError if this machine or its device lacks what the optimizer needs."""
    check_name(name, where)
    if of_bitsandbytes(name) and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{where}optimizer={name} needs bitsandbytes.", "Run: pip install bitsandbytes")
    if name.startswith("paged_") and device.type == "cpu":
        what = f"{where}optimizer={name} moves pages between a GPU and memory; this is a CPU."
        raise ConfigError(what, f"Use {name.removeprefix('paged_') if '8bit' in name else DEFAULT}.")
    if name == DEFAULT and device.type not in _get_fused_kernels_supported_devices():
        raise ConfigError(f"{where}optimizer={name} has no {device.type} kernel.", "Use adamw_torch.")


def of_bitsandbytes(name: str) -> bool:
    """Return whether an optimizer is one of bitsandbytes."""
    return name.startswith(_BNB)


def _why_not(name: str) -> tuple[str, str] | None:
    return next((why for names, why in _REFUSED.items() if name.startswith(names)), None)


def make_optimizer(name: str, groups: list[dict[str, Any]], **more: Any) -> Optimizer:
    """Return the optimizer of this name as the Trainer makes it with its defaults, over a method's groups.

    Args:
        name: one that `check_optimizer` lets pass.
        groups: parameters and their rates.
        more: the optimizer's own arguments.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    fields = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}  # making one would set up the machine
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(SimpleNamespace(**fields | {"optim": OptimizerNames(name)}))  # type: ignore[arg-type]
    made: Optimizer = kind(groups, **settings | more)
    return made
