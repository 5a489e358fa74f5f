"""Packed weights: parameters that a quantised base keeps in few bits, read as plain tensors.

bitsandbytes keeps 4-bit and 8-bit weights in parameters of its own classes, and what scales them beside; torchao keeps
tensors of its own classes. Both compute with the packed weight themselves, so that a delta with a quick form needs it
only where it reads the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _four(module: Any, packed: Any) -> Tensor:
    from bitsandbytes import functional

    keep_gradients(module)  # the other layout cannot be read
    state = packed.quant_state
    made: Tensor = functional.dequantize_4bit(packed.data, state).to(state.dtype)
    return made


def _eight(module: Any, packed: Any) -> Tensor:
    scales = packed.SCB if packed.SCB is not None else module.state.SCB  # the first forward moves them
    made: Tensor = packed.data * (scales / 127).unsqueeze(1)
    return made


def _subclass(module: Any, packed: Any) -> Tensor:
    made: Tensor = packed.dequantize()
    return made


_READ: dict[str, Callable[[Any, Any], Tensor]] = {
    "Params4bit": _four,
    "Int8Params": _eight,
    "TorchAOBaseTensor": _subclass,
}


def _reader(tensor: Any) -> Callable[[Any, Any], Tensor] | None:
    if type(tensor) in (nn.Parameter, Tensor, type(None)):
        return None
    # A torchao parameter is of the tensor's class; looked up by name, since neither package need be there.
    return next((_READ[kind.__name__] for kind in type(tensor).__mro__ if kind.__name__ in _READ), None)


def is_packed(tensor: Tensor | None) -> bool:
    """Return whether a parameter holds values in few bits that only its package can read."""
    return _reader(tensor) is not None


def unread(model: nn.Module) -> str:
    """Return the package that packed a model so that no training pass reads its weights; '' if none did."""
    config = getattr(vars(model).get("hf_quantizer"), "quantization_config", None)
    kind = getattr(config, "quant_method", "")
    name = str(getattr(kind, "value", kind))
    rounds = name == "torchao" and any(getattr(p, "act_quant_kwargs", None) is not None for p in model.parameters())
    return name if rounds or name not in ("bitsandbytes", "torchao") else ""


def dense(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return a parameter of `module` as a plain tensor: a new one `[out, in]` if it is packed."""
    read = _reader(tensor)
    with torch.no_grad():
        return tensor if read is None else read(module, tensor)


def stored(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold the values of `tensor`: itself, and what a packed one keeps beside or is."""
    if type(tensor).__name__ in ("Params4bit", "Int8Params"):
        beside: Any = tensor
        if (state := beside.__dict__.get("quant_state")) is None:
            return [tensor] if beside.SCB is None else [tensor, beside.SCB]
        more = [state, state.state2] if state.nested else [state]
        return [tensor, *(t for s in more for t in (s.absmax, s.code, s.offset) if isinstance(t, Tensor))]
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in stored(getattr(tensor, str(name)))]


def form_of(tensor: Any) -> str:
    """Return the name of the form that a packed weight is in."""
    kind = type(tensor).__name__
    return str(tensor.quant_state.quant_type) if kind == "Params4bit" else kind


def packed_again(module: Any, like: Any, value: Tensor, config: Any) -> nn.Parameter:
    """Return `value` `[out, in]` packed as the weight `like` of `module` is.

    Args:
        config: the model's `quantization_config`, which torchao's forms are made from.
    """
    kind = type(like).__name__
    if kind == "Params4bit":
        made = type(like)(
            value.contiguous(), requires_grad=False, blocksize=like.blocksize, quant_type=like.quant_type,
            compress_statistics=like.compress_statistics, quant_storage=like.quant_storage,
        )  # fmt: skip
        return made.to(like.device)  # type: ignore[no-any-return]
    if kind == "Int8Params":
        if like.CB is None:  # what the first forward moved; back in place, `like` may come back too
            like.CB, like.SCB = module.state.CB, module.state.SCB
        return type(like)(value.contiguous(), requires_grad=False).to(like.device)  # type: ignore[no-any-return]
    from torchao.quantization import quantize_

    out, width = value.shape
    linear = nn.Linear(width, out, bias=False, device="meta")
    linear.weight = nn.Parameter(value, requires_grad=False)
    quantize_(nn.Sequential(linear), config.get_apply_tensor_subclass())
    return linear.weight


def hollow(module: Any, tensor: Tensor) -> Tensor:
    """Return a tensor on the meta device, of the shape that a parameter or buffer of `module` stands for."""
    if is_packed(tensor):
        return torch.empty(module.out_features, module.in_features, device="meta")
    return torch.empty_like(tensor, device="meta")


def keep_gradients(module: Any) -> None:
    """Keep a 4-bit map in the layout whose product has a backward pass.

    On CPUs with AVX512-BF16 bitsandbytes 0.50 changes the layout of the weight in its first evaluation; from then on no
    gradient passes the map, without an error. Undone later, the scales are left rounded to bfloat16.
    """
    if "Linear4bit" not in (kind.__name__ for kind in type(module).__mro__):
        return
    module.support_avx512bf16_for_cpu = False
    weight = module._parameters["weight"]
    state = weight.__dict__.get("quant_state")
    if state is not None and vars(state).get("packing_format_for_cpu", False):
        from bitsandbytes import functional

        weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
