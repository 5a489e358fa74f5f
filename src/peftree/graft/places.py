"""What a delta needs beyond its own module, where it cannot sit, and facts about modules that the graft asks for."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from peftree.deltas import Attend, Delta, Prepend, Reweight, Rewrite, Side
from peftree.errors import MethodError
from peftree.sites import Site

CLASS_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
LENGTH_FIRST = {
    f"transformers.models.{name}"
    for name in (
        "fsmt.modeling_fsmt.EncoderLayer",
        "fsmt.modeling_fsmt.DecoderLayer",
        "led.modeling_led.LEDEncoderSelfAttention",
        "longformer.modeling_longformer.LongformerSelfAttention",
    )
}  # code that turns what it is given, or gives on what was turned, to `[length, rows, width]`


def refuse(site: Site, delta: Delta, module: nn.Module) -> None:
    """Raise MethodError if a delta that changes weights or outputs cannot act at the place of `module`."""
    if not isinstance(delta, Reweight | Rewrite | Attend | Prepend | Side):
        raise MethodError(f"{type(delta).__name__} is not one of the five verbs.", "Subclass one of them.")
    if isinstance(delta, Attend | Prepend | Side) or (isinstance(delta, Rewrite) and site.kind == "branch"):
        return
    if isinstance(delta, Rewrite) and (site.kind == "raw" or ((site.kind == "conv" or site.maps) and not delta.maps)):
        kinds = {"raw": "a single parameter", "conv": "a convolution"}
        what = kinds.get(site.kind, "a layer of convolutions")
        raise MethodError(
            f"{site.name} ({site.path}) is {what}, whose output is not one vector per token.",
            "Name linear maps, or use a method that changes weights.",
        )
    if isinstance(delta, Rewrite) and site.kind == "expert" and (site.rows or site.role in ("ffn.up", "ffn.gate")):
        raise MethodError(
            f"{site.name} ({site.path}) is one map inside stacked experts, so its output is not visible.",
            "Use sites='ffn.down' or 'ffn', or a method that changes weights.",
        )
    if isinstance(delta, Reweight) and site.parameter not in module._parameters:
        raise MethodError(
            f"{site.name} ({site.path}) is of kind '{site.kind}' and has no weight of its own.",
            "Name other sites; `peftree inspect` lists them with their kinds.",
        )


def connects(site: Site, delta: Delta) -> bool:
    """Return whether a delta needs more than its own module: a stack, an attention call, a branch, the scene."""
    verb = isinstance(delta, Attend | Prepend | Side) or (isinstance(delta, Rewrite) and site.kind == "branch")
    return verb or delta.looks or delta.blocks > 0


def tower(path: str, module: nn.Module) -> bool:
    """Return whether users call this part of a model directly: one of two encoders, a model below its head."""
    children = bool(module._modules) and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    return isinstance(module, PreTrainedModel) or ("." not in path and children)


def within(path: str, outer: str) -> bool:
    """Return whether `path` is `outer` or lies below it."""
    return path == outer or path.startswith(outer + ".")


def join(path: str, name: str) -> str:
    """Return the path of `name` below `path`, which may be the whole model's, empty."""
    return f"{path}.{name}" if path else name


def slots(module: nn.Module, name: str) -> int:
    """Return how many tokens a class or register parameter `[1, n, d]` or `[d]` holds."""
    parameter = module.get_parameter(name)
    return parameter.shape[1] if parameter.dim() == 3 else 1
