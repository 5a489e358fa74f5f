"""Rows of an image with a text, and what tasks on them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from peftree.data.exchange import partners
from peftree.data.images import Images, Look
from peftree.data.picture import content
from peftree.data.rows import Example
from peftree.errors import ConfigError
from peftree.files import sha256


class Pairs(Dataset[dict[str, Any]]):
    """Features of texts, each with the pixels of its image.

    Args:
        rows: rows whose sources are paths of images.
        features: features of the texts, in the same order.
        look: how the model expects images.
    """

    def __init__(self, rows: Sequence[Example], features: Sequence[dict[str, Any]], look: Look) -> None:
        self.images = Images([(row.source, 0) for row in rows], look)
        self.features = list(features)
        self.order = list(range(len(rows)))
        self.keys: list[tuple[str]] = []

    def shuffled(self, seed: int = 0) -> Pairs | None:
        """Return the same texts, each with another image; `seed` draws which; None: over half have the same image."""
        self.keys = self.keys or [(sha256(content(image)),) for image, _ in self.images.rows]
        found = partners(self.keys, seed)
        if len(found) < len(self):
            return None
        other = Pairs((), self.features, self.images.look)
        other.images, other.order = self.images, list(found.values())
        return other

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.features[index], "pixel_values": self.images[self.order[index]]["pixel_values"]}


def image_features(model: Any, look: Look) -> Tensor:
    """Return the model's features of one grey image, `[1, ...]` or a list of one.

    Raises:
        ConfigError: its vision tower does not take images of that size.
    """
    weight = next(model.parameters())
    pixels = torch.zeros(1, 3, look.size, look.size, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            found: Tensor = model.get_image_features(pixel_values=pixels).pooler_output
    except ValueError as error:
        raise ConfigError(f"image_size={look.size}: {str(error).rstrip('.')}.", "Leave image_size unset.") from None
    return found
