"""How well a model does: scores of a task, with one number per item."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.errors import DivergedError, TrainError
from peftree.loss import deferred, pieces


@dataclass(frozen=True)
class Scores:
    """The result on a set of items, in their order.

    Attributes:
        metric: name of the primary metric.
        items: its part for each item: 0 or 1 for accuracy and recall, the absolute error for mae, mean negative
            log-likelihood in nats of a completion's tokens for perplexity.
        values: every metric by name, including the primary one.
        higher_is_better: direction of the primary metric.
        aggregate: how `items` give the primary metric: their `mean`, or `exp_mean`.
        constant: the score of one answer for all items: their commonest class or text, the error of their mean; None
            if there is no such answer.
    """

    metric: str
    items: tuple[float, ...]
    values: Mapping[str, float]
    higher_is_better: bool = True
    aggregate: Literal["mean", "exp_mean"] = "mean"
    constant: float | None = None

    @property
    def score(self) -> float:
        """The primary metric."""
        return self.values[self.metric]

    def unbeaten(self, base: float | None) -> str:
        """Return what this score is no better than; `base` is the score without the adapter; empty if nothing."""
        sign = 1 if self.higher_is_better else -1
        others = {"one answer for all rows": self.constant, "the model without the adapter": base}
        found = [f"{who} ({x:.4g})" for who, x in others.items() if x is not None and sign * (self.score - x) <= 0]
        return " and ".join(found)


def aggregated(items: Sequence[float], aggregate: str) -> float:
    """Return the primary metric of items: their mean, or for `exp_mean` its exponential, which stays finite."""
    mean = float(np.mean(items))
    return math.exp(min(mean, 700.0)) if aggregate == "exp_mean" else mean


def _commonest(wanted: Sequence[Any]) -> float:
    """Return the share of the commonest of `wanted`."""
    return max(Counter(wanted).values()) / len(wanted)


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
        TrainError: there are no items, or a logit is not finite.
    """
    predicted, wanted = _answers(model, batches, lambda logits: logits.argmax(-1))
    right = np.asarray(predicted) == np.asarray(wanted)
    values = {"accuracy": float(right.mean()), "macro_f1": macro_f1(predicted, wanted)}
    return Scores("accuracy", tuple(right.astype(float).tolist()), values, constant=_commonest(wanted))


def _answers(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], read: Callable[[Tensor], Tensor]
) -> tuple[list[Any], list[Any]]:
    """Return what `read` makes of the logits `[batch, outputs]` of all items, and their labels."""
    found, wanted = list[Any](), list[Any]()
    with evaluating(model):
        for batch in batches:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
            _check_finite(logits)
            found += read(logits).tolist()
            wanted += batch["labels"].tolist()
    _check_count(wanted)
    return found, wanted


def complete(model: nn.Module, batches: Iterable[Mapping[str, Any]], chunked: bool = True) -> Scores:
    """Score a language model on batches whose `labels` `[batch, tokens]` are -100 outside completions.

    Labels are those of the tokens themselves, which earlier places predict; in a batch with `decoder_input_ids`,
    which are one place behind, each place predicts its own.

    Perplexity is `exp` of the mean over items of an item's mean negative log-likelihood.
    `token_accuracy` is the mean over items of the share of tokens that come first; `exact_match` the
    share of items where all do, which is when greedy decoding gives the completion. If `chunked`, only the logits that
    are scored are computed, some tokens at a time; see `loss`.

    Raises:
        TrainError: there are no items, an item has no token to score, or a value is not finite.
    """
    items: list[float] = []
    shares: list[float] = []
    with evaluating(model):
        for batch in batches:
            losses, hits = completed(model, batch, chunked)
            items += losses
            shares += hits
    _check_count(items)
    values = {
        "perplexity": aggregated(items, "exp_mean"),
        "nll": float(np.mean(items)),
        "token_accuracy": float(np.mean(shares)),
        "exact_match": float(np.mean([share == 1.0 for share in shares])),
    }
    return Scores("perplexity", tuple(items), values, higher_is_better=False, aggregate="exp_mean")


def regress(model: nn.Module, batches: Iterable[Mapping[str, Any]], mean: float = 0.0, std: float = 1.0) -> Scores:
    """Score a model with one output on batches with `labels` `[batch]`: mean absolute error, and three more values.

    Outputs and labels are standardised: `mean` and `std` turn both back into the units of the errors. The
    correlations are 0 if one side is constant, since it then says nothing.

    Raises:
        TrainError: there are no items.
        DivergedError: an output is not finite.
    """
    from scipy.stats import rankdata  # takes 40 MB, which no other task should pay

    predicted, wanted = _answers(model, batches, lambda logits: logits[:, 0])
    p, w = np.asarray(predicted) * std + mean, np.asarray(wanted) * std + mean
    errors = np.abs(p - w)
    values = {
        "mae": float(errors.mean()),
        "rmse": float(np.sqrt(np.mean(errors**2))),
        "pearson": _correlation(p, w),
        "spearman": _correlation(rankdata(p), rankdata(w)),
    }
    constant = float(np.abs(w - w.mean()).mean())
    return Scores("mae", tuple(errors.tolist()), values, higher_is_better=False, constant=constant)


def _correlation(one: Any, two: Any) -> float:
    """Return Pearson's r of two vectors; 0 if one is constant."""
    a, b = one - one.mean(), two - two.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 1e-12 * len(a) else 0.0


def retrieve(model: nn.Module, batches: Iterable[Mapping[str, Any]], texts: Sequence[str]) -> Scores:
    """Score a dual encoder, whose output has `image_embeds` and `text_embeds`: each finds the other in the whole set.

    `recall@k` is the share of images that have a text equal to their own (but for case and spaces) among the k
    most similar of all texts, equal texts counted once; a tie with a wrong text counts against it.
    `text_to_image_recall@1` is the share of texts, one for each row, whose most similar image has that text.

    Args:
        model: gives normalised embeddings `[batch, width]`.
        batches: the rows in their order.
        texts: the text of every row.

    Raises:
        TrainError: all rows have the same text, so nothing can be mistaken.
        DivergedError: an embedding is not finite.
    """
    index = {text: i for i, text in enumerate(dict.fromkeys(_plain(text) for text in texts))}
    if len(index) < 2:
        raise TrainError(f"The {len(texts)} scored rows have {len(index)} different texts.", "Retrieval needs two.")
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    with evaluating(model):
        for batch in batches:
            out = model(**{k: v for k, v in batch.items() if k != "return_loss"})
            for kept, part in zip(sides, (out.image_embeds, out.text_embeds), strict=True):
                _check_finite(part)
                kept.append(part.float().cpu())
    similar = torch.cat(sides[0]) @ torch.cat(sides[1]).T  # [images, texts]
    numbers = [index[_plain(text)] for text in texts]
    own = torch.tensor(numbers)
    same = own[:, None] == own[None]
    # Of equal texts, whose embeddings are equal too, the first stands for all.
    first = torch.tensor([numbers.index(i) for i in range(len(index))])
    places = _places(similar[:, first], same[:, first])
    values = {f"recall@{k}": float((places < k).double().mean()) for k in (1, 5, 10)}
    values["text_to_image_recall@1"] = float((_places(similar.T, same) < 1).double().mean())
    values["gallery"] = float(len(index))
    return Scores("recall@1", tuple((places < 1).double().tolist()), values, constant=_commonest(numbers))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _places(similar: Tensor, right: Tensor) -> Tensor:
    """Return for each row how many wrong columns are at least as similar as the best right one."""
    best = similar.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((similar >= best) & ~right).sum(1)


def completed(
    model: nn.Module, batch: Mapping[str, Any], chunked: bool = True
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Return the mean negative log-likelihood of each item of a batch, and its share of hits; see `complete`."""
    labels = batch["labels"] if "decoder_input_ids" in batch else batch["labels"][:, 1:]
    kept = labels.ne(-100)
    counts = kept.sum(1).cpu()
    if not bool(counts.all()):
        raise TrainError("An item has no completion token.", "Raise max_length or shorten the rows.")
    with deferred(model, chunked):
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    found, right, finite = token_scores(logits, kept.nonzero(as_tuple=True), labels[kept])
    if not bool(finite):
        raise _not_finite()
    losses = torch.zeros(labels.shape, dtype=torch.float32)
    hits = torch.zeros(labels.shape, dtype=torch.bool)
    losses[kept.cpu()], hits[kept.cpu()] = found.cpu(), right.cpu()
    return (losses.sum(1) / counts).tolist(), (hits.sum(1) / counts).tolist()


def token_scores(logits: Tensor, places: tuple[Tensor, ...], wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return negative log-likelihoods and hits of tokens, `[tokens]` each, and whether all logits are finite.

    Args:
        logits: `[batch, places, vocabulary]`; of deferred ones only those of `places` are computed, some at a time.
        places: rows and columns of the logits that predict.
        wanted: the tokens.
    """
    losses, hits = wanted.new_empty(len(wanted), dtype=torch.float32), torch.empty_like(wanted, dtype=torch.bool)
    finite = hits.new_ones(())
    for part, chosen in pieces(logits, places):
        finite &= torch.isfinite(torch.stack(torch.aminmax(chosen))).all()  # takes no copy
        losses[part] = functional.cross_entropy(chosen, wanted[part], reduction="none")
        hits[part] = chosen.argmax(-1) == wanted[part]
    return losses, hits, finite


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
        raise TrainError("There is nothing to score.", "Give a test or validation file that has rows.")


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise _not_finite()


def _not_finite() -> DivergedError:
    return DivergedError("The model's output is not finite.", "The adapter diverged: lower lr, or use float32.")
