"""Safetensors files to tensors: the header is parsed here, with limits, from bytes that were read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from safetensors.torch import save as pack_bytes
from torch import Tensor

from peftree.deltas.verbs import finite
from peftree.errors import StoreError
from peftree.files import parse_object

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER, NAME, DIMENSIONS = 1 << 22, 512, 8
_ADVICE = "The file is damaged or not an adapter; fetch or save the adapter again."


@dataclass(frozen=True)
class Entry:
    """One tensor as a header states it: dtype, shape, and its half-open range of bytes in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors file of these tensors.

    Raises:
        StoreError: a tensor has no values (meta device), an unknown dtype, or is not finite.
    """
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise StoreError(f"{name} is on the meta device and has no values.", "Load real weights first.")
        if tensor.dtype not in NAMES:
            raise StoreError(f"{name} has the dtype {tensor.dtype}.", "Cast the adapter to float32 before saving.")
        check_finite(name, tensor)
        ready[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return pack_bytes(ready, metadata={"format": "pt"})


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise StoreError if `tensor` holds a NaN or an infinity."""
    if tensor.is_floating_point() and not finite([tensor]):
        raise StoreError(
            f"{name} holds NaN or infinite values.", "Training diverged; go back to an earlier checkpoint."
        )


def header(data: bytes | bytearray, where: str) -> dict[str, Entry]:
    """Return what the header of a safetensors file states, checked against the file's length.

    Args:
        data: the whole file.
        where: the file's name, for messages.

    Raises:
        StoreError: the header is malformed, or its tensors do not tile the rest of the file exactly.
    """
    if len(data) < 8:
        raise StoreError(f"{where} has {len(data)} bytes and no header.", _ADVICE)
    length = int.from_bytes(data[:8], "little")
    if length > HEADER or 8 + length > len(data):
        raise StoreError(f"{where} states a header of {length:,} bytes.", _ADVICE)
    try:
        raw = parse_object(bytes(data[8 : 8 + length]))
        metadata = raw.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its __metadata__ is not text")
        entries = {name: _entry(name, value, 8 + length) for name, value in raw.items()}
        _check_tiling(entries, 8 + length, len(data))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} has a bad header: {str(error)[:200]}.", _ADVICE) from None
    return entries


def _entry(name: str, value: object, base: int) -> Entry:
    if len(name) > NAME or not name.isprintable():
        raise ValueError(f"the tensor name {name[:40]!r} is too long or not printable")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has other keys than dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {str(dtype)[:20]!r}")
    if not _naturals(shape) or len(shape) > DIMENSIONS:
        raise ValueError(f"{name} has an invalid shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has invalid data_offsets")
    start, stop = offsets
    size = DTYPES[dtype].itemsize * prod(shape)
    if stop - start != size:
        raise ValueError(f"{name} needs {size:,} bytes and has {stop - start:,}")
    return Entry(DTYPES[dtype], tuple(shape), base + start, base + stop)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 53 for v in value)


def _check_tiling(entries: Mapping[str, Entry], start: int, stop: int) -> None:
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise ValueError(f"{name} overlaps another tensor or leaves a gap")
        at = entry.stop
    if at != stop:
        raise ValueError(f"its tensors end at byte {at:,} of {stop:,}")


def view(data: bytearray, name: str, entry: Entry) -> Tensor:
    """Return one tensor as a view of the file's bytes.

    Raises:
        StoreError: its values are not finite, or not 0 and 1 for a bool.
    """
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=entry.dtype)
    count = (entry.stop - entry.start) // entry.dtype.itemsize
    if entry.dtype == torch.bool:
        raw = torch.frombuffer(data, dtype=torch.uint8, count=count, offset=entry.start)
        if int(raw.max()) > 1:
            raise StoreError(f"{name} holds bytes that are not booleans.", _ADVICE)
    aligned = entry.start % entry.dtype.itemsize == 0
    # Offsets of a foreign file may be odd; then the bytes are copied to an aligned place.
    source, offset = (data, entry.start) if aligned else (data[entry.start : entry.stop], 0)
    tensor = torch.frombuffer(source, dtype=entry.dtype, count=count, offset=offset).view(entry.shape)
    check_finite(name, tensor)
    return tensor
