"""Images to tensors with Pillow and torch: read, resize, crop, normalise; no torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_processing_base import ImageProcessingMixin

from peftree.errors import ConfigError, DataError

CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Look:
    """How a model wants its images.

    Attributes:
        size: side in pixels.
        mean, std: of each channel, for values in 0..1.
        resample: Pillow's number of the filter (3 is bicubic).
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = 3


class Images(Dataset[dict[str, Any]]):
    """Image files with labels; the resized pixels stay in memory while they are few.

    Args:
        rows: path and label of each image.
        look: how the model wants them.
    """

    def __init__(self, rows: Sequence[tuple[str, int]], look: Look) -> None:
        self.rows = list(rows)
        self.look = look
        self.cached = len(self.rows) * 3 * look.size**2 <= CACHE_BYTES
        self.cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.rows[index]
        pixels = self.cache.get(index)
        if pixels is None:
            pixels = read_pixels(path, self.look)
            if self.cached:
                self.cache[index] = pixels
        return {"pixel_values": normalise(pixels, self.look), "labels": label}


def read_pixels(path: str, look: Look) -> Tensor:
    """Return a file's pixels, uint8 `[3, size, size]`: short side to `size`, then the middle square.

    Raises:
        DataError: the file is no readable image.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is no readable image: {error}.", "Replace or remove it.") from None
    factor = look.size / min(image.size)
    width, height = (max(look.size, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling(look.resample))
    left, top = (width - look.size) // 2, (height - look.size) // 2
    image = image.crop((left, top, left + look.size, top + look.size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(pixels: Tensor, look: Look) -> Tensor:
    """Return uint8 pixels `[3, h, w]` as float32 with the model's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (look.mean, look.std))
    return (pixels.float() / 255 - mean) / std


def read_look(model: str, local: bool, config: Any, wanted: int | None) -> Look:
    """Return how `model` wants images: its preprocessor's settings, `wanted` as the size if given.

    Raises:
        ConfigError: no size is known, or patches do not fit into it.
    """
    settings: dict[str, Any] = {}
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model, local_files_only=local)
    except (OSError, ValueError):
        settings = {}  # a model without preprocessor_config.json: 0.5 and 0.5, as ViT has
    size = wanted or _side(settings.get("crop_size")) or _side(settings.get("size"))
    size = size or _side(getattr(config, "image_size", None))
    if size is None:
        raise ConfigError(f"{model} names no image size.", "Set image_size.")
    patch = _side(getattr(config, "patch_size", None)) or 1
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise ConfigError(f"image_size={size} is no multiple of the patch size {patch}.", f"Use {near}.")
    plain = Look(size)
    return Look(
        size,
        _three(settings.get("image_mean")) or plain.mean,
        _three(settings.get("image_std")) or plain.std,
        int(settings.get("resample", plain.resample)),
    )


def _side(value: Any) -> int | None:
    if isinstance(value, dict):
        value = value.get("height", value.get("shortest_edge"))
    if isinstance(value, list | tuple):
        value = value[0]
    return int(value) if value else None


def _three(value: Any) -> tuple[float, float, float] | None:
    if isinstance(value, list | tuple) and len(value) == 3:
        return (float(value[0]), float(value[1]), float(value[2]))
    return None
