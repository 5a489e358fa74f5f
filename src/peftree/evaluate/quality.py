"""How well a model does: scores of a task with one number for every item."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.errors import TrainError


@dataclass(frozen=True)
class Scores:
    """The result on a set of items, in their order.

    Attributes:
        metric: name of the primary metric.
        items: its part for each item: 0 or 1 for accuracy, mean negative log-likelihood in nats of a
            completion's tokens for perplexity.
        values: every metric by name, the primary one among them.
        higher_is_better: direction of the primary metric.
        aggregate: how `items` give the primary metric: their `mean`, or `exp_mean`.
    """

    metric: str
    items: tuple[float, ...]
    values: Mapping[str, float]
    higher_is_better: bool = True
    aggregate: Literal["mean", "exp_mean"] = "mean"

    @property
    def score(self) -> float:
        """The primary metric."""
        return self.values[self.metric]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode and builds no graph; its mode is restored after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def classify(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Scores:
    """Score a classifier on batches with `labels` `[batch]`: accuracy and macro-F1.

    Raises:
        TrainError: there is no item, or a logit is not finite.
    """
    predicted: list[int] = []
    wanted: list[int] = []
    with evaluating(model):
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = model(**inputs).logits.float()
            _check_finite(logits)
            predicted += logits.argmax(-1).tolist()
            wanted += batch["labels"].tolist()
    _check_count(wanted)
    right = np.asarray(predicted) == np.asarray(wanted)
    values = {"accuracy": float(right.mean()), "macro_f1": macro_f1(predicted, wanted)}
    return Scores("accuracy", tuple(right.astype(float).tolist()), values)


def complete(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Scores:
    """Score a causal language model on batches whose `labels` `[batch, tokens]` are -100 outside completions.

    Perplexity is `exp` of the mean over items of an item's mean negative log-likelihood.
    `token_accuracy` is the mean over items of the share of tokens that come first; `exact_match` the
    share of items where all do, which is when greedy decoding gives the completion.

    Raises:
        TrainError: there is no item, an item has no token to score, or a value is not finite.
    """
    items: list[float] = []
    shares: list[float] = []
    with evaluating(model):
        for batch in batches:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            labels = batch["labels"][:, 1:]
            losses, right = _tokens(model(**inputs).logits[:, :-1], labels)
            kept = labels.ne(-100)
            counts = kept.sum(1)
            if not bool(counts.all()):
                raise TrainError("An item has no completion token.", "Raise max_length.")
            items += (losses.sum(1) / counts).tolist()
            shares += ((right & kept).sum(1) / counts).tolist()
    _check_count(items)
    mean = float(np.mean(items))
    values = {
        "perplexity": math.exp(min(mean, 700.0)),
        "nll": mean,
        "token_accuracy": float(np.mean(shares)),
        "exact_match": float(np.mean([share == 1.0 for share in shares])),
    }
    return Scores("perplexity", tuple(items), values, higher_is_better=False, aggregate="exp_mean")


def _tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return negative log-likelihoods (0 outside completions) and hits, `[batch, tokens]` each."""
    losses = torch.zeros(labels.shape, dtype=torch.float32)
    right = torch.zeros(labels.shape, dtype=torch.bool)
    kept = labels.ne(-100)
    chosen = logits[kept].float()  # [scored tokens, vocabulary]: the prompts' logits are not widened
    _check_finite(chosen)
    losses[kept.cpu()] = functional.cross_entropy(chosen, labels[kept], reduction="none").cpu()
    right[kept.cpu()] = (chosen.argmax(-1) == labels[kept]).cpu()
    return losses, right


def macro_f1(predicted: list[int], wanted: list[int]) -> float:
    """Return the mean over classes of F1 = 2 TP / (2 TP + FP + FN); classes that never occur are left out."""
    p, w = np.asarray(predicted), np.asarray(wanted)
    scores = []
    for label in np.union1d(p, w):
        hits = int(((p == label) & (w == label)).sum())
        scores.append(2 * hits / int((p == label).sum() + (w == label).sum()))
    return float(np.mean(scores))


def _check_count(items: list[Any]) -> None:
    if not items:
        raise TrainError("There is nothing to score.", "Give a test or validation file with rows.")


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise TrainError("The model's output is not finite.", "The adapter has diverged: lower lr, or use float32.")
