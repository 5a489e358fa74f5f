"""Text classification: one text in, a class out."""

from __future__ import annotations

from peftree.data.rows import Data, Example
from peftree.evaluate import quality
from peftree.tasks.base import Items, Options, Task
from peftree.tasks.loading import label_order, read_config
from peftree.tasks.one_text import OneText, loaded


class TextClassification(OneText):
    """A sequence classifier; the label is the class's index."""

    name = "text-classification"
    modality = "language"
    kind = "understanding"
    metric = "accuracy"
    columns = ("text", "label")
    classes = True
    auto = "AutoModelForSequenceClassification"

    @classmethod
    def load(cls, model: str, data: Data, options: Options) -> tuple[Task, list[str]]:
        """Load a sequence classifier with the labels of `data`."""
        net, tokens, fit, fresh = loaded(model, read_config(model, options.config, data.labels), options)
        return cls(net, tokens, fit, label_order(net.config)), fresh

    def label(self, row: Example) -> int:
        """Return the index of the row's class."""
        return self.labels.index(row.target)

    def score(self, items: Items, batch_size: int = 32) -> quality.Scores:
        """Accuracy and macro-F1."""
        return quality.classify(self.model, self.batches(items, batch_size))
