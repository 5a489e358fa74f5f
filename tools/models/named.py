"""What a model says that it misses, made from the name of the argument and from the other inputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Field = Callable[..., int]
Batch = dict[str, Any]
WANTED = re.compile(r"`?\b([a-z]+_\w+)`? (?:must be given|cannot be `?None)|have to specify (?:either )?`?([a-z]+_\w+)")
REQUIRED = re.compile(r"missing \d+ required positional arguments?: (.+)$")


def missing(said: str) -> list[str]:
    """Return the names of the arguments that Python says a call lacks."""
    found = REQUIRED.search(said)
    wanted = WANTED.search(said)
    return re.findall(r"'(\w+)'", found[1]) if found else [wanted[1] or wanted[2]] if wanted else []


def supplied(names: list[str], batch: Batch, field: Field) -> Batch | None:
    """Return the batch with the arguments that it lacks, or None if a name tells nothing.

    Args:
        names: what is missing.
        batch: the other inputs; their rows and lengths are taken.
        field: returns the first number of some names in the model's configs, or 0.
    """
    made = dict(batch)
    if {"hidden_states", "grid_thw"} <= set(names) or names == ["hidden_states"]:
        made |= patches(field, "hidden_states")
    for name in names:
        if name not in made:
            value = _named(name, made, field)
            if value is None:
                return None
            made[name] = value
    return made


def patches(field: Field, key: str, times: int = 1) -> Batch:
    """Return 4 x 4 flat patches of one image and their grid."""
    side = field("patch_size") or 14
    width = (field("num_channels", "in_channels", "in_chans") or 3) * side * side
    frames = (field("temporal_patch_size", "patch_temporal") or 1) * times
    return {key: _real(16, frames * width), "grid_thw": torch.tensor([[1, 4, 4]])}


def _named(name: str, batch: Batch, field: Field) -> Tensor | None:
    """Return a value for the argument `name`, by what its name says it is."""
    tensors = [v for v in batch.values() if isinstance(v, Tensor)]
    rows = tensors[0].shape[0] if tensors else 2
    pixels: Tensor | None = batch.get("pixel_values")
    width = field("hidden_size", "d_model") or 64
    if pixels is not None and re.fullmatch(r"prompt_(pixel_values|masks)", name):
        return pixels.flip(0) if name.endswith("values") else pixels.roll(1, -1)
    if re.fullmatch(r"(grid_thw|image_grid_thw)", name):
        return torch.tensor([[1, 4, 4]])
    if name == "merge_sizes":
        return torch.tensor([field("spatial_merge_size", "merge_size") or 2])
    if name == "freq":
        return torch.zeros(rows, 1, dtype=torch.long)
    if name == "latents":
        return _real(rows, width, 8)
    if name == "input_values":
        return _real(rows, 1, 4000)
    if name == "audio_mel":
        return _real(rows, 64, field("input_feat_size", "num_mel_bins") or 128)
    if name == "audio_mel_mask":
        return torch.zeros(rows, 64, dtype=torch.bool)
    if name.endswith(("input_ids", "task_inputs")):
        own: Tensor | None = batch.get("input_ids")
        return own.clone() if own is not None else torch.arange(4, 4 + (field("task_seq_len") or 12)).repeat(rows, 1)
    if name.endswith(("_embeds", "_hidden_states")):
        encoder = "encoder_hidden_size" if name.startswith("encoder") else "hidden_size"
        return _real(rows, 8, field(encoder) or width)
    if name.endswith(("_mask", "_padding")) and tensors:
        of = max(tensors, key=lambda t: t.ndim)
        return torch.full(of.shape[:2], int(name.endswith("_mask")))
    return None


def _real(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))
