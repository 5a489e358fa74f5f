"""Text classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from peftree.evaluate import quality
from peftree.train.data import Data, Example
from peftree.train.tasks.base import Batch, Items, Options, Rows, Task, pad
from peftree.train.tasks.loading import label_order, length, load, pad_id, read_config, tokenizer


class TextClassification(Task):
    """A sequence classifier; texts are cut at `max_length` tokens."""

    name = "text-classification"
    metric = "accuracy"

    def __init__(self, model: nn.Module, tokenizer: Any, labels: Sequence[str], length: int) -> None:
        super().__init__(model, labels)
        self.tokenizer = tokenizer
        self.length = length
        self.pad = pad_id(tokenizer)

    def items(self, rows: Sequence[Example]) -> Rows:
        """Tokenize; the label is the class's index."""
        if not rows:
            return Rows([])
        encoded = self.tokenizer([r.source for r in rows], truncation=True, max_length=self.length)
        index = {name: i for i, name in enumerate(self.labels)}
        return Rows(
            [
                {"input_ids": ids, "labels": index[row.target]}
                for ids, row in zip(encoded["input_ids"], rows, strict=True)
            ]
        )

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad at the right to the longest text of the batch."""
        labels = torch.tensor([f["labels"] for f in features])
        return pad([f["input_ids"] for f in features], self.pad) | {"labels": labels}

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Accuracy and macro-F1."""
        return quality.classify(self.model, self.batches(items, batch_size))


def load_classification(model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
    """Load a sequence classifier with the labels of `data`."""
    config, tokens = read_config(model, options.config, data.labels), tokenizer(model)
    config.pad_token_id = pad_id(tokens)
    net, fresh = load(AutoModelForSequenceClassification, model, config, options)
    fit = length(net, tokens, options.max_length)
    return TextClassification(net, tokens, label_order(config), fit), fresh
