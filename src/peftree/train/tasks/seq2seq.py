"""Generation by an encoder-decoder: the encoder reads the prompt, the decoder writes the completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import AutoModelForSeq2SeqLM

import peftree.assets.ssru  # noqa: F401  (makes its model known to transformers' auto classes)
from peftree.errors import ConfigError, DataError
from peftree.train.data import Data, Example
from peftree.train.tasks import generation
from peftree.train.tasks.base import IGNORED, Batch, Options, Task, pad
from peftree.train.tasks.decoding import greedy
from peftree.train.tasks.loading import length, load, read_config, tokenizer


class SequenceToSequence(generation.Completions):
    """An encoder-decoder; the loss is on the completion and its stop token.

    Prompt and completion have `max_length` tokens each; what is longer is cut at its end, a prompt before the token
    that ends it, and a completion then has no stop token.
    """

    name = "generation"
    metric = "perplexity"
    higher_is_better = False

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, generate: int = 0) -> None:
        super().__init__(model, tokenizer, length, generate)
        net: Any = model
        start = net.config.decoder_start_token_id
        if start is None:
            raise ConfigError(
                "The model does not say with which token its decoder starts.", "Set config.decoder_start_token_id."
            )
        self.start = int(start)

    def encode_row(self, row: Example) -> tuple[list[int], list[int]]:
        """Return the tokens of prompt and completion, each with the special tokens that its tokenizer adds.

        A prompt of no token is the stop token: an encoder needs one at least.
        """
        source: list[int] = self.tokenizer(row.source)["input_ids"]
        target: list[int] = self.tokenizer(text_target=row.target)["input_ids"]
        return source or self.ending, target if target[-1:] == self.ending else target + self.ending

    def features(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """Return token ids of the prompt, those of the completion as labels, and the text that is wanted.

        Raises:
            DataError: a completion has no token.
        """
        features: list[dict[str, Any]] = []
        cut = [0, 0]
        for row in rows:
            source, target = self.encode_row(row)
            if not self.ids(row.target):
                raise DataError(f"{row.where}: {row.target!r} has no token.", "Remove the row, or write it in words.")
            cut[0] += len(source) > self.length
            cut[1] += len(target) > self.length
            source = source if len(source) <= self.length else [*source[: self.length - 1], source[-1]]
            features.append({"input_ids": source, "labels": target[: self.length], "target": row.target})
        for what, count in zip(("prompts", "completions"), cut, strict=True):
            if count:
                self.notes.append(f"{count} of {len(rows)} {what} are longer than max_length={self.length} and cut")
        return features

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad both sides at the right; the decoder reads the labels one place later."""
        batch = pad([f["input_ids"] for f in features], self.pad)
        labels = pad([f["labels"] for f in features], IGNORED)["input_ids"]
        net: Any = self.model
        return batch | {
            "decoder_input_ids": net.prepare_decoder_input_ids_from_labels(labels=labels),
            "labels": labels,
        }

    def write(self, features: Sequence[Mapping[str, Any]], batch_size: int) -> list[list[int]]:
        """Return the tokens that greedy decoding writes for each row."""
        return greedy(self.model, features, self.pad, self.ending[0], batch_size, self.bar, self.start)


def load_generation(model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
    """Load an encoder-decoder, or any other model as `generation.load_generation` does.

    Raises:
        ConfigError: the model does not load, or has no tokenizer or a length that does not fit.
    """
    config = read_config(model, options.config, data.labels)
    if not config.is_encoder_decoder:
        return generation.load_generation(model, data, options)
    if options.chat:
        raise ConfigError("chat is on, but an encoder-decoder has no chat template.", "Set chat: false.")
    tokens = tokenizer(model)
    net, fresh = load(AutoModelForSeq2SeqLM, model, config, options)
    return SequenceToSequence(net, tokens, length(net, tokens, options.max_length), options.generate), fresh
