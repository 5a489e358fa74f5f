"""Text classification and text regression: one text in, a class or a number out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from peftree.errors import DataError
from peftree.evaluate import quality
from peftree.train.data import Data, Example
from peftree.train.tasks.base import Batch, Items, Options, Rows, Task, pad
from peftree.train.tasks.loading import label_order, length, load, pad_id, read_config, tokenizer


class OneText(Task):
    """A sequence classifier or regressor; texts are cut at `max_length` tokens."""

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, labels: Sequence[str] = ()) -> None:
        super().__init__(model, labels)
        self.tokenizer = tokenizer
        self.length = length
        self.pad = pad_id(tokenizer)

    @abstractmethod
    def label(self, row: Example) -> int | float:
        """Return what the model should put out for a row."""

    def items(self, rows: Sequence[Example]) -> Rows:
        """Tokenize."""
        if not rows:
            return Rows([])
        encoded = self.tokenizer([r.source for r in rows], truncation=True, max_length=self.length)
        return Rows(
            [{"input_ids": ids, "labels": self.label(row)} for ids, row in zip(encoded["input_ids"], rows, strict=True)]
        )

    def collate(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        """Pad at the right to the longest text of the batch."""
        labels = torch.tensor([f["labels"] for f in features])
        return pad([f["input_ids"] for f in features], self.pad) | {"labels": labels}


class TextClassification(OneText):
    """A sequence classifier; the label is the class's index."""

    name = "text-classification"
    metric = "accuracy"

    def label(self, row: Example) -> int:
        """Return the index of the row's class."""
        return self.labels.index(row.target)

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Accuracy and macro-F1."""
        return quality.classify(self.model, self.batches(items, batch_size))


class TextRegression(OneText):
    """A model with one output, trained with the squared error.

    Targets are standardised by the mean and deviation of the training rows; `output * std + mean` is
    the prediction in the data's own units, and scores are in these.
    """

    name = "text-regression"
    metric = "mae"
    higher_is_better = False

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, mean: float, std: float) -> None:
        super().__init__(model, tokenizer, length)
        self.mean, self.std = mean, std
        self.notes.append(f"targets are standardised: a prediction is the output times {std:.6g} plus {mean:.6g}")

    def label(self, row: Example) -> float:
        """Return the row's number, standardised."""
        return (float(row.target) - self.mean) / self.std

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Mean absolute and root mean squared error, Pearson's and Spearman's correlation."""
        return quality.regress(self.model, self.batches(items, batch_size), self.mean, self.std)


def load_classification(model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
    """Load a sequence classifier with the labels of `data`."""
    net, tokens, fit, fresh = _load(model, read_config(model, options.config, data.labels), options)
    return TextClassification(net, tokens, fit, label_order(net.config)), fresh


def load_regression(model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
    """Load a sequence model with one output.

    Raises:
        DataError: all training rows have the same number.
    """
    wanted = np.array([float(row.target) for row in data.train])
    if np.ptp(wanted) == 0:
        raise DataError(f"All training rows have the score {wanted[0]:g}.", "Regression needs two values at least.")
    config = read_config(model, options.config, ())
    config.num_labels, config.problem_type = 1, "regression"
    net, tokens, fit, fresh = _load(model, config, options)
    return TextRegression(net, tokens, fit, float(wanted.mean()), float(wanted.std())), fresh


def _load(model: str, config: Any, options: Options) -> tuple[Any, Any, int, list[str]]:
    """Return model, tokenizer, tokens of a row, and the names of new tensors."""
    tokens = tokenizer(model)
    config.pad_token_id = pad_id(tokens)
    net, fresh = load(AutoModelForSequenceClassification, model, config, options)
    return net, tokens, length(net, tokens, options.max_length), fresh
