"""Hidden states of a model's body, and the similarity of two sets of them: linear CKA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from peftree.adapter import disabled
from peftree.evaluate.quality import evaluating
from peftree.evaluate.subject import IMAGES, TEXTS, Row, Subject, Unmeasured, inputs, real_tokens
from peftree.sites import Site

_TOKENS = 2048  # states that CKA looks at
_READ = tuple(dict.fromkeys((*TEXTS, *IMAGES)))  # a diffusion model gives out no hidden states
_TOWERS = {"image-text-retrieval": "vision", "captioning": "text"}  # of models with two; the others have one


def body(subject: Subject) -> Site | None:
    """Return the stack whose states are read, the same for every method of a task; None if there is none."""
    if subject.task not in _READ or not isinstance(subject.model, PreTrainedModel):
        return None
    tower = _TOWERS.get(subject.task)
    stacks = [s for s in subject.adapter.graft.tree if s.role == "stack"]
    return next((s for s in stacks if tower in (None, s.tower)), None)


def states(subject: Subject, rows: Sequence[Row], deep: bool) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Yield for every batch the states `[rows, tokens, d]` of the body, and where its tokens are not padding.

    Args:
        subject: a model that has a `body`.
        rows: the rows to run.
        deep: yield the output of every layer, with the body's result in place of the last; else only that result.

    The graft removes virtual tokens, as from every output of the body.
    """
    stack = body(subject)
    assert stack is not None
    found: list[Any] = []
    module = subject.model.get_submodule(stack.path)
    hook = module.register_forward_hook(lambda module, args, out: found.append(out))
    try:
        with evaluating(subject.model):
            for batch in subject.batches(rows):
                found.clear()
                subject.model(**inputs(batch), output_hidden_states=deep)
                layers = list(found[-1].hidden_states[1:-1]) if deep else []
                seen = [_tokens(s) for s in (*layers, found[-1].last_hidden_state)]
                yield seen, real_tokens(batch, (seen[-1].shape[0], seen[-1].shape[1]))
    finally:
        hook.remove()


def _tokens(state: Tensor) -> Tensor:
    """Return a state as `[rows, tokens, d]`; maps `[rows, d, height, width]` have one token per place."""
    return state.flatten(2).mT if state.dim() == 4 else state


def pooled(subject: Subject, rows: Sequence[Row]) -> NDArray[np.float64]:
    """Return the mean over real tokens of the body's result, `[rows, d]`."""
    out = []
    for (last,), mask in states(subject, rows, deep=False):
        weights = last.new_ones(last.shape[:2]) if mask is None else mask.to(last.dtype)
        mean = (last * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp_min(1)
        out.append(mean.double().cpu().numpy())
    return np.concatenate(out)


def by_layer(subject: Subject, rows: Sequence[Row]) -> list[NDArray[np.float64]]:
    """Return for every layer the states of evenly spread real tokens of every row, `[about 2,048 at most, d]`."""
    out: list[list[NDArray[np.float64]]] = []
    each = max(1, _TOKENS // len(rows))
    for seen, mask in states(subject, rows, deep=True):
        out = out or [[] for _ in seen]
        for column, state in zip(out, seen, strict=True):
            count = state.shape[1]
            at = torch.arange(min(each, count), device=state.device) * count // min(each, count)
            kept = state[:, at]
            here = None if mask is None or mask.shape[1] != count else mask[:, at]
            column.append((kept.flatten(0, 1) if here is None else kept[here]).double().cpu().numpy())
    return [np.concatenate(column) for column in out]


def cka(X: NDArray[np.float64], Y: NDArray[np.float64]) -> float:
    """Return linear centred kernel alignment, `|Yc' Xc|² / (|Xc' Xc| |Yc' Yc|)` (Kornblith 2019, arXiv 1905.00414).

    Args:
        X, Y: states `[n, d]` and `[n, e]` of the same n tokens. 1: equal up to rotation, shift and scale.

    States that do not vary are equal (1) if neither varies, else unequal (0). A few dimensions of large values, which
    language models have, dominate the result.
    """
    X, Y = X - X.mean(0), Y - Y.mean(0)
    own, other = np.linalg.norm(X.T @ X), np.linalg.norm(Y.T @ Y)
    if own == 0 or other == 0:
        return float(own == other)
    return float(np.linalg.norm(Y.T @ X) ** 2 / (own * other))


def likeness(subject: Subject, rows: Sequence[Row]) -> list[float] | Unmeasured:
    """Return for every layer the `cka` of its states with the adapter off and on."""
    if not rows:
        return Unmeasured(why="There are no test rows; only the weights were examined.")
    if body(subject) is None:
        return Unmeasured(why=f"{type(subject.model).__name__} has no body with hidden states to read.")
    with disabled(subject.model):
        before = by_layer(subject, rows)
    after = by_layer(subject, rows)
    if any(x.shape != y.shape for x, y in zip(before, after, strict=True)):
        return Unmeasured(why="The adapter leaves its own tokens in the states, so tokens have no counterparts.")
    return [cka(x, y) for x, y in zip(before, after, strict=True)]
