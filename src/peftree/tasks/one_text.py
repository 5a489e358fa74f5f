"""What tasks that read one text share: a sequence classifier or regressor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from peftree.data.rows import Example
from peftree.tasks.base import Batch, Options, Rows, Task, pad
from peftree.tasks.loading import cut_texts, length, load, pad_id, tokenizer


class OneText(Task):
    """A sequence classifier or regressor; texts are cut at `max_length` tokens."""

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, labels: Sequence[str] = ()) -> None:
        super().__init__(model, labels)
        self.tokenizer = tokenizer
        self.length = length
        self.pad = pad_id(tokenizer)

    @abstractmethod
    def label(self, row: Example) -> int | float:
        """Return the output that the model should give for a row."""

    def items(self, rows: Sequence[Example]) -> Rows:
        """Tokenize."""
        if not rows:
            return Rows([])
        encoded, cut = cut_texts(self.tokenizer, [r.source for r in rows], self.length)
        self.note_cut([rows[i] for i in cut], len(rows), "texts", f"at the end, to max_length={self.length} tokens")
        return Rows([{"input_ids": ids, "labels": self.label(row)} for ids, row in zip(encoded, rows, strict=True)])

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad on the right to the longest text of the batch."""
        labels = torch.tensor([f["labels"] for f in features])
        return pad([f["input_ids"] for f in features], self.pad) | {"labels": labels}


def loaded(model: str, config: Any, options: Options) -> tuple[Any, Any, int, list[str]]:
    """Return model, tokenizer, most tokens per row, and the names of new tensors."""
    tokens = tokenizer(model)
    config.pad_token_id = pad_id(tokens)
    net, fresh = load(AutoModelForSequenceClassification, model, config, options)
    return net, tokens, length(net, tokens, options.max_length), fresh
