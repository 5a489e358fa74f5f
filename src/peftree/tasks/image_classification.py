"""Image classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification

from peftree.data.images import Images, Look, read_look
from peftree.data.rows import Data, Example
from peftree.evaluate import quality
from peftree.tasks.base import Batch, Items, Options, Task
from peftree.tasks.loading import is_local, label_order, load, read_config, takes


class ImageClassification(Task):
    """An image classifier; images are resized by their short side and cropped to a square."""

    name = "image-classification"
    modality = "vision"
    kind = "understanding"
    metric = "accuracy"
    classes = True
    auto = "AutoModelForImageClassification"

    def __init__(self, model: nn.Module, look: Look, labels: Sequence[str]) -> None:
        super().__init__(model, labels)
        self.look = look
        self.notes.append(look.told())
        own = getattr(model.config, "image_size", None)
        self.interpolate = own not in (None, look.size) and takes(model, "interpolate_pos_encoding")

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load an image classifier with the labels of `data`."""
        config = read_config(model, options.config, data.labels)
        look = read_look(model, is_local(model), config, options.image_size)
        net, fresh = load(AutoModelForImageClassification, model, config, options)
        return cls(net, look, label_order(config)), fresh

    def items(self, rows: Sequence[Example]) -> Images:
        """Return the images as a data set; small sets are decoded once."""
        index = {name: i for i, name in enumerate(self.labels)}
        return Images([(row.source, index[row.target]) for row in rows], self.look)

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Stack the images `[batch, 3, size, size]`."""
        batch: Batch = {
            "pixel_values": torch.stack([f["pixel_values"] for f in features]),
            "labels": torch.tensor([f["labels"] for f in features]),
        }
        if self.interpolate:  # a flag of ViT-like models for another size than they were trained on
            batch["interpolate_pos_encoding"] = True  # type: ignore[assignment]
        return batch

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Accuracy and macro-F1."""
        return quality.classify(self.model, self.batches(items, batch_size))
