"""The precision of a run's passes: torch's autocast beside the dtype of the base, refused where a device lacks it."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

from peftree.errors import ConfigError

Precision = Literal["float32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a device computes passes in `precision`; float32: whatever dtype the tensors have."""
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else contextlib.nullcontext()


def check_precision(precision: str, device: torch.device, where: str = "") -> None:
    """Raise ConfigError, which starts with `where`, if the device cannot compute in `precision`, or only as a trap.

    torch emulates both on any CPU. A product in bf16 is then still as fast as one in float32; one in fp16 takes
    several times as long, and some operations have no fp16 form, so it needs a processor with fp16 of its own.
    """
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ConfigError(
            f"{where}precision=fp16: this processor has no fp16 arithmetic, and emulated it is slower than float32.",
            "Set precision=bf16, or precision=float32.",
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"{where}precision=bf16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic.",
            "Set precision=fp16, whose loss is scaled, or precision=float32.",
        )
