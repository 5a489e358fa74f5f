"""Image-text retrieval: two towers place matching images and texts close to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from peftree.data.images import Look, read_look
from peftree.data.rows import Data, Example
from peftree.errors import ConfigError
from peftree.evaluate import quality
from peftree.tasks.base import Batch, Items, Options, Task, pad
from peftree.tasks.loading import cut_texts, is_local, length, load, pad_id, read_config, takes, tokenizer
from peftree.tasks.pairs import Pairs, image_features


class Retrieval(Task):
    """A dual encoder with the contrastive loss of its batch; texts are cut at `max_length` tokens.

    In a batch, every other row is a wrong answer, so larger batches are harder and teach more; one row teaches nothing.
    """

    name = "image-text-retrieval"
    modality = "vision-language"
    kind = "understanding"
    metric = "recall@1"
    columns = ("file_name", "text")
    contrastive = True

    def __init__(self, model: nn.Module, tokenizer: Any, look: Look, length: int) -> None:
        super().__init__(model)
        self.tokenizer = tokenizer
        self.look = look
        self.notes.append(look.told())
        self.length = length
        self.pad = pad_id(tokenizer)

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load a dual encoder: VisionTextDualEncoder, CLIP or SigLIP.

        Raises:
            ConfigError: it is not a dual encoder, or its vision tower does not take images of that size.
        """
        config, tokens = read_config(model, options.config, ()), tokenizer(model)
        net: Any
        net, fresh = load(AutoModel, model, config, options)
        if not takes(net, "return_loss"):
            raise ConfigError(
                f"model: {model} is a {type(net).__name__}, not a dual encoder.",
                "Use a VisionTextDualEncoder (dual-minilm-dinov2), CLIP or SigLIP model.",
            )
        look = read_look(model, is_local(model), config.vision_config, options.image_size)
        image_features(net, look)
        return cls(net, tokens, look, length(net.text_model, tokens, options.max_length)), fresh

    def items(self, rows: Sequence[Example]) -> Pairs:
        """Tokenize the texts; small sets of images are decoded once."""
        texts = [row.target for row in rows]
        ids, cut = cut_texts(self.tokenizer, texts, self.length)
        self.note_cut([rows[i] for i in cut], len(rows), "texts", f"at the end, to max_length={self.length} tokens")
        return Pairs(rows, [{"input_ids": i, "text": t} for i, t in zip(ids, texts, strict=True)], self.look)

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad the texts on the right and stack the images `[batch, 3, size, size]`."""
        batch = pad([f["input_ids"] for f in features], self.pad)
        batch["pixel_values"] = torch.stack([f["pixel_values"] for f in features])
        batch["return_loss"] = True  # type: ignore[assignment]  # a flag of these models
        return batch

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Recall of the right text among all texts of `items`, and of the right image; see `quality.retrieve`."""
        assert isinstance(items, Pairs)
        return quality.retrieve(self.model, self.batches(items, batch_size), [f["text"] for f in items.features])
