"""Captioning: a LLaVA model, a vision encoder in front of a causal language model, writes an image's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from peftree.data.chats import ASKS
from peftree.data.images import Look, read_look
from peftree.data.rows import Data, Example
from peftree.errors import ConfigError
from peftree.evaluate import quality
from peftree.tasks.base import Batch, Items, Options, Task
from peftree.tasks.completions import Completions
from peftree.tasks.image_text import ImageText
from peftree.tasks.loading import is_local, length, load, read_config, tokenizer
from peftree.tasks.pairs import Pairs, image_features
from peftree.tasks.turns import Encoded, given


class Captioning(Completions):
    """A LLaVA model; the loss is on the caption and its stop token.

    A row is the image's tokens, the words "Caption:", and the caption; `max_length` counts all of them, and a
    caption that is too long is cut at its end and then has no stop token.
    """

    name = "captioning"
    modality = "vision-language"
    kind = "generation"
    metric = "perplexity"
    higher_is_better = False
    aggregate = "exp_mean"
    columns = ("file_name", "text")
    auto = "AutoModelForImageTextToText"

    def __init__(
        self, model: nn.Module, tokenizer: Any, look: Look, image: Sequence[int], length: int, generate: int = 0
    ) -> None:
        super().__init__(model, tokenizer, length, generate)
        self.look = look
        self.notes.append(look.told())
        self.front = [*image, *self.ids(ASKS)]
        self.fixed = len(self.front)
        if length <= self.fixed + 1:
            raise ConfigError(
                f"max_length={length}: the image and its prompt take {self.fixed} tokens.", "Raise max_length."
            )

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load a LLaVA model, or another that reads images by its own processor.

        Raises:
            ConfigError: the model has no processor, or its vision tower does not take images of that size.
        """
        config = read_config(model, options.config, ())
        if config.model_type != "llava":
            return ImageText.load(model, data, options)
        look = read_look(model, is_local(model), config.vision_config, options.image_size)
        tokens = tokenizer(model)
        net: Any
        net, fresh = load(LlavaForConditionalGeneration, model, config, options)
        image = [config.image_token_id] * len(image_features(net, look)[0])
        fit = length(net.model.language_model, tokens, options.max_length)
        return cls(net, tokens, look, image, fit, options.generate), fresh

    def encode_row(self, row: Example) -> Encoded:
        """Return the tokens of image and prompt, and those of the caption with its stop token."""
        return given(self.front, self.ids(f" {row.target}") + self.ending)

    def items(self, rows: Sequence[Example]) -> Pairs:
        """Tokenize the captions; labels are -100 before them; small sets of images are decoded once."""
        return Pairs(rows, self.features(rows), self.look)

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad on the right, stack the images `[batch, 3, size, size]`, and leave out the logits of the image's tokens.

        `labels` are `[batch, kept]`, for the last `kept` tokens, the only ones for which the model computes logits.
        """
        batch = super().collate(features)
        # The last token of the prompt predicts the first of the caption.
        kept = batch["labels"].shape[1] - self.fixed + 1
        batch["labels"] = batch["labels"][:, -kept:]
        batch["pixel_values"] = torch.stack([f["pixel_values"] for f in features])
        batch["logits_to_keep"] = kept  # type: ignore[assignment]
        return batch

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Scores of the captions as in `Generation`, and the control `shuffled_perplexity`.

        The control gives each caption the image of another row. A model that does not look at the image has
        the same perplexity there. Rows of which more than half have the same image have no control.
        """
        scores = super().score(items, batch_size)
        assert isinstance(items, Pairs)
        if (shuffled := items.shuffled()) is None:
            return scores
        control = quality.complete(self.model, self.batches(shuffled, batch_size), self.chunked)
        return replace(scores, values={**scores.values, "shuffled_perplexity": control.score})
