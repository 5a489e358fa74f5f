"""Images to tensors: by the model's own image processor, or read, resized, cropped and normalised here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoImageProcessor
from transformers.image_processing_base import ImageProcessingMixin

from peftree.data.picture import broken, read_picture
from peftree.errors import ConfigError
from peftree.trusted import SAFE

CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Look:
    """How a model expects its images.

    Attributes:
        size: side in pixels.
        mean, std: those of each channel, for values in 0..1.
        resample: Pillow's number for the filter (3 is bicubic).
        processor: the model's own, which then does everything; None: short side to `size`, then the middle square.
        asked: the options of every call of the processor.
    """

    size: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = 3
    processor: Any = field(default=None, compare=False)
    asked: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def told(self) -> str:
        """Return a description of what is done to images."""
        how = f"by the model's own {type(self.processor).__name__}" if self.processor else "by short side and cropped"
        return f"images are resized to {self.size} x {self.size} pixels {how}"


class Images(Dataset[dict[str, Any]]):
    """Images with labels; pixels stay in memory if there are few images.

    Args:
        rows: the image, a path or `Held`, and the label of each.
        look: how the model expects them.
    """

    def __init__(self, rows: Sequence[tuple[str, int]], look: Look) -> None:
        self.rows = list(rows)
        self.look = look
        self.cached = len(self.rows) * 12 * look.size**2 <= CACHE_BYTES
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
        return {"pixel_values": pixels, "labels": label}


def read_pixels(path: str, look: Look) -> Tensor:
    """Return the model's input for an image, float32 `[3, size, size]`.

    Raises:
        DataError: it is not a readable image.
    """
    from PIL import Image

    try:
        image = read_picture(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise broken(path, error) from None
    if look.processor is not None:
        return _processed(image, look.processor, look.asked)
    factor = look.size / min(image.size)
    width, height = (max(look.size, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling(look.resample))
    left, top = (width - look.size) // 2, (height - look.size) // 2
    image = image.crop((left, top, left + look.size, top + look.size))
    return normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), look)


def _processed(image: Any, processor: Any, asked: Mapping[str, Any]) -> Tensor:
    found: Tensor = processor(images=image, return_tensors="pt", **asked)["pixel_values"][0]
    return found


def normalise(pixels: Tensor, look: Look) -> Tensor:
    """Return uint8 pixels `[3, h, w]` as float32 with the model's mean and deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (look.mean, look.std))
    return (pixels.float() / 255 - mean) / std


def read_look(model: str, local: bool, config: Any, wanted: int | None) -> Look:
    """Return how `model` expects images: its own image processor decides, at the size `wanted` if given.

    Raises:
        ConfigError: no size is known, or it is not a multiple of the patch size.
    """
    settings: dict[str, Any] = {}
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model, local_files_only=local)
    except (OSError, ValueError):
        settings = {}  # a model without preprocessor_config.json: 0.5 and 0.5, as ViT has
    processor, asked, side = _own(model, local, wanted) if settings else (None, {}, None)
    size = side or wanted or _side(settings.get("crop_size")) or _side(settings.get("size"))
    size = size or _side(getattr(config, "image_size", None))
    if size is None:
        raise ConfigError(f"{model} does not name an image size.", "Set image_size.")
    patch = _side(getattr(config, "patch_size", None)) or 1
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise ConfigError(f"image_size={size} is not a multiple of the patch size {patch}.", f"Use {near}.")
    plain = Look(size)
    return Look(
        size,
        _three(settings.get("image_mean")) or plain.mean,
        _three(settings.get("image_std")) or plain.std,
        int(settings.get("resample") or plain.resample),
        processor,
        asked,
    )


def _own(model: str, local: bool, wanted: int | None) -> tuple[Any, dict[str, Any], int | None]:
    """Return the model's image processor, its options, and the side that it resizes an image to.

    Return nothing if it cannot be loaded here, or gives images different shapes, which cannot form a batch.
    """
    try:
        found: Any = AutoImageProcessor.from_pretrained(model, local_files_only=local, **SAFE)
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        return None, {}, None
    asked = _asked(found, wanted) if wanted else {}
    shapes = {_shape(found, size, asked) for size in ((48, 64), (64, 48))}
    side = next(iter(shapes))
    if len(shapes) > 1 or len(side) != 3 or side[1] != side[2] or (wanted and side[1] != wanted):
        return None, {}, None
    return found, asked, side[1]


def _asked(processor: Any, wanted: int) -> dict[str, Any]:
    """Return options with which `processor` resizes images to `wanted`, with resizing and cropping in proportion."""
    square = {"height": wanted, "width": wanted}
    size, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
    edge, cropped = size.get("shortest_edge"), crop.get("height")
    if cropped and getattr(processor, "do_center_crop", False):
        edge = round((edge or size["height"]) * wanted / cropped)
        whole = {"shortest_edge": edge} if size.get("shortest_edge") else {"height": edge, "width": edge}
        return {"size": whole, "crop_size": square}
    return {"size": {"shortest_edge": wanted} if edge else square}


def _shape(processor: Any, size: tuple[int, int], asked: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape to which an image of `size` is resized; empty if the processor fails."""
    from PIL import Image

    try:
        return tuple(_processed(Image.new("RGB", size), processor, asked).shape)
    except (ValueError, TypeError, KeyError, AttributeError):
        return ()


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
