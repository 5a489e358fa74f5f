"""Digests of a tensor's bits: any changed value changes them, and they are the same on every device.

The bits are read as 32-bit words, in blocks of 2^14. A block's sum is that of its words times odd 64-bit numbers, one
for each position, modulo 2^64: a change of one word always changes it, since an odd factor has an inverse, and several
changes cancel with a chance of at most 2^-32. The digest is the start of the SHA-256 of all sums. Integer sums do not
depend on the order of adding, so threads and devices agree.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

SIZE, BLOCK = 8, 1 << 14  # bytes of a digest, words of one sum
AT_ONCE = {"cpu": 1 << 16}  # words of one step: what a core's cache holds
SAMPLES = 256  # values of a tensor by which a change is noticed that torch does not count
State = tuple[int, int, torch.dtype, torch.Size, bytes]
_read: Any = WeakTensorKeyDictionary()  # state and digest of the bits of every tensor that was read and is still there
_known: dict[tuple[bytes, torch.dtype], bytes] = {}  # what rounding gave, by the digest of the bits that were rounded


def digests(tensor: Tensor, rounded: Sequence[torch.dtype] = (), again: bool = False) -> list[bytes]:
    """Return the digest of the bits of `tensor`, and those of its values rounded to each dtype of `rounded`.

    A tensor without a float dtype is not rounded. What was rounded before is looked up by its bits.

    Args:
        tensor: of any shape, dtype and device with values; for a sharded one, every process must call this.
        rounded: dtypes.
        again: take the digest that was computed before for this tensor object, if its version, place in memory and
            some of its values are the same. This sees every change but one through `.data` or numpy that spares these
            values.
    """
    if isinstance(tensor, DTensor):
        return digests(tensor.full_tensor(), rounded)
    if is_traceable_wrapper_subclass(tensor):  # a quantised weight: its inner tensors
        names, _ = tensor.__tensor_flatten__()
        parts = [digests(getattr(tensor, str(name)), rounded, again) for name in names]
        return [hashlib.sha256(b"".join(column)).digest()[:SIZE] for column in zip(*parts, strict=True)]
    flat = tensor.detach().contiguous().reshape(-1)
    state = None if tensor.is_inference() else _state(tensor, flat)
    before = _read.get(tensor) if again and state is not None else None
    own = before[1] if before is not None and before[0] == state else _digest(flat, flat.dtype)
    if state is not None:
        _read[tensor] = (state, own)
    found = [own]
    for dtype in rounded:
        same, key = not flat.is_floating_point() or flat.dtype == dtype, (own + str(flat.dtype).encode(), dtype)
        if not same and key not in _known:
            _known[key] = _digest(flat, dtype)
        found.append(own if same else _known[key])
    return [each[:SIZE] for each in found]


def _state(tensor: Tensor, flat: Tensor) -> State:
    """Return what tells whether `tensor` was changed: version, address, dtype, shape, and `SAMPLES` values' bits."""
    step = max(1, flat.numel() // SAMPLES)
    while math.gcd(step, *tensor.shape[-1:]) > 1:  # else all samples are in a few columns
        step -= 1
    some = flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.shape, some


def _digest(flat: Tensor, dtype: torch.dtype) -> bytes:
    sums = [part.cpu().numpy().astype("<i8").tobytes() for part in _sums(flat, dtype)]
    return hashlib.sha256(b"".join(sums)).digest()


def _sums(flat: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the sums of the blocks of `flat` as `dtype`, some blocks at a time, on its device."""
    factors = _factors(flat.device)
    step = AT_ONCE.get(flat.device.type, 1 << 24) * 4 // dtype.itemsize
    for start, end in pairwise([*range(0, flat.numel(), step), flat.numel()]):
        raw = flat[start:end].to(dtype).view(torch.uint8)
        if len(raw) % 4:
            raw = torch.nn.functional.pad(raw, (0, -len(raw) % 4))
        words = raw.view(torch.int32)
        whole = len(words) // BLOCK * BLOCK
        if whole:
            yield (words[:whole].view(-1, BLOCK) * factors).sum(1)
        if whole < len(words):
            yield (words[whole:] * factors[: len(words) - whole]).sum(0, keepdim=True)


@lru_cache(8)
def _factors(device: torch.device) -> Tensor:
    odd = np.random.PCG64(2014).random_raw(BLOCK) | np.uint64(1)
    return torch.from_numpy(odd.astype(np.uint64).view(np.int64)).to(device)
