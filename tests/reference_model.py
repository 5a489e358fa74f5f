"""Runs a bare tiny model with a method's reference around it: weights replaced, outputs changed by hooks."""

from __future__ import annotations

import inspect
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import zoo

# Where a sub-layer begins and ends, written down by hand: below its layer, the module whose input is the sub-layer's,
# the module whose output is, and the module whose input is the residual stream before its norm.
FFN = {
    "llama": ("model.layers.{}", "mlp", "mlp", "post_attention_layernorm"),
    "vit": ("vit.layers.{}", "mlp", "mlp", "layernorm_after"),
    "bert_cls": ("bert.encoder.layer.{}", "intermediate", "output.dense", "intermediate"),
}


def parts_of(adapter: Any, leaves: dict[int, Tensor]) -> list[SimpleNamespace]:
    """Return one namespace for each place of an adapter: its role, sizes, and its tensors as leaves by name."""
    found = []
    for index, (_, site, delta) in enumerate(adapter.entries):
        made: dict[str, Tensor] = {}
        for name, tensor in [*delta.named_parameters(), *delta.named_buffers()]:
            copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            made["n_" if name == "n" else name.replace(".", "_")] = leaves.setdefault(id(tensor), copy)
        facts = {
            "role": site.role, "index": index, "path": site.path, "parameter": site.parameter, "layer": site.layer,
            "n": site.in_features, "m": site.out_features, "biased": site.bias is not None, "depth": len(site.layers),
            "kv": site.kv_heads * site.head_dim, "kv_heads": site.kv_heads, "heads": site.heads,
            "head_dim": site.head_dim,
        }  # fmt: skip
        found.append(SimpleNamespace(**(facts | made)))
        if site.kind == "raw":
            found[-1].size = delta.value.numel()
    return found


def forward(key: str, reference: ModuleType, parts: list[SimpleNamespace], fields: Any) -> Tensor:
    """Return the main output of the bare model `key` with the reference's changes."""
    model = zoo.build(key).eval().requires_grad_(False)
    batch = zoo.batch(key)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    changed: dict[str, Tensor] = {}
    for part in parts:
        weight, bias = f"{part.path}.{part.parameter}", f"{part.path}.bias"
        if "weight" in vars(reference):
            changed[weight] = reference.weight(tensors[weight], part, fields)
        if "bias" in vars(reference) and bias in tensors:
            changed[bias] = reference.bias(tensors[bias], part, fields)
        if "output" in vars(reference) and not (part.role == "attn" and "run" in vars(reference)):
            _hook(key, model, reference, part, fields, batch)
    if "run" in vars(reference):
        made: Tensor = reference.run(model, batch, parts, fields)
        return made
    return zoo.output(key, functional_call(model, changed, kwargs=batch))


def _hook(key: str, model: Any, reference: ModuleType, part: SimpleNamespace, fields: Any, batch: Any) -> None:
    """Let the reference's `output` see the sub-layer's or module's input `x` and change its output `y`."""
    start = end = part.path
    if part.role == "ffn":
        root, source, out, residual = FFN[key]
        layer = root.format(part.layer)
        start = f"{layer}.{source if reference.READS == 'input' else residual}"
        end = f"{layer}.{out}"
    seen: list[Tensor] = []
    wanted = inspect.signature(reference.output).parameters

    def before(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: Any, kwargs: Any, y: Any) -> Any:
        more = {"module": module, "kwargs": kwargs, "real": batch.get("attention_mask")}
        return reference.output(seen.pop(), y, part, fields, **{k: v for k, v in more.items() if k in wanted})

    model.get_submodule(start).register_forward_pre_hook(before, with_kwargs=True)
    model.get_submodule(end).register_forward_hook(after, with_kwargs=True)


def close(got: Tensor, want: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp_min(1e-12))


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return the gradient of `loss` for every leaf; zeros where it does not depend on one."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
