"""Text regression: one text in, a number out."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from peftree.data.rows import Data, Example
from peftree.errors import DataError
from peftree.evaluate import quality
from peftree.tasks.base import Items, Options, Task
from peftree.tasks.loading import read_config
from peftree.tasks.one_text import OneText, loaded


class TextRegression(OneText):
    """A model with one output, trained with the squared error.

    Targets are standardised by the mean and deviation of the training rows; `output * std + mean` is
    the prediction in the data's own units, which scores use too.
    """

    name = "text-regression"
    modality = "language"
    kind = "understanding"
    metric = "mae"
    higher_is_better = False
    columns = ("text", "score")
    auto = "AutoModelForSequenceClassification"

    def __init__(self, model: nn.Module, tokenizer: Any, length: int, mean: float, std: float) -> None:
        super().__init__(model, tokenizer, length)
        self.mean, self.std = mean, std
        self.notes.append(f"targets are standardised: a prediction is the output times {std:.6g} plus {mean:.6g}")

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load a sequence model with one output.

        Raises:
            DataError: all training rows have the same number.
        """
        wanted = np.array([float(row.target) for row in data.train])
        if np.ptp(wanted) == 0:
            raise DataError(f"All training rows have the score {wanted[0]:g}.", "Regression needs at least two values.")
        config = read_config(model, options.config, ())
        config.num_labels, config.problem_type = 1, "regression"
        net, tokens, fit, fresh = loaded(model, config, options)
        return cls(net, tokens, fit, float(wanted.mean()), float(wanted.std())), fresh

    def label(self, row: Example) -> float:
        """Return the row's number, standardised."""
        return (float(row.target) - self.mean) / self.std

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Mean absolute and root mean squared error, Pearson's and Spearman's correlation."""
        return quality.regress(self.model, self.batches(items, batch_size), self.mean, self.std)
