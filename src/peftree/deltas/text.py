"""What a delta asks of the scene: the rows of its tokens, their places and ids, a summary of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from peftree.deltas.scene import scene
from peftree.deltas.verbs import Delta
from peftree.errors import MethodError


def pooled(x: Tensor, encoded: bool = False) -> Tensor:
    """Return the mean of `x` `[batch, tokens, d]` over the tokens of the prompt, `[batch, d]`; 0 where there is none.

    Where the scene knows of no prompt (images), it is that of all tokens.

    Args:
        x: of the tokens of this pass.
        encoded: they are the encoder's, which a decoder looks at.
    """
    which = scene().encoded if encoded else scene().prompt
    if which is None:
        return x.mean(1)
    kept = which.to(x.dtype)
    return (x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)


def largest(x: Tensor) -> Tensor:
    """Return the largest values of `x` `[batch, tokens, d]` over the prompt's tokens, `[batch, d]`; see `pooled`."""
    which = scene().prompt
    found = (x if which is None else x.masked_fill(~which[..., None], -torch.inf)).amax(1)
    return found.masked_fill(found.isinf(), 0.0)


def by_rows(x: Tensor, place: str) -> Tensor:
    """Return `x` `[batch, .., d]` as `[batch, tokens, d]`; inside experts it is `[batch * tokens, d]`.

    Raises:
        MethodError: they are a part of the tokens, of which no one says whose rows they are.
    """
    shape = scene().shape
    if x.dim() > 2:
        return x.flatten(1, -2)
    if shape is None or shape[0] * shape[1] != len(x):
        raise MethodError(
            f"{place} sees tokens without their rows, so they have no others of their text to look at.",
            "Leave the sites inside experts out.",
        )
    return x.view(*shape, -1)


def token_ids(place: str) -> Tensor:
    """Return the ids of the tokens of this pass, int64 `[batch, tokens]`, -1 for virtual ones.

    Raises:
        MethodError: the model was given embeddings.
    """
    found = scene().ids
    if found is None:
        raise MethodError(
            f"{place} changes tokens by their ids, and the model was called without.",
            "Pass input_ids, or leave `ids` empty to choose tokens by place.",
        )
    return found


def summary(delta: Delta, x: Tensor, encoded: bool = False) -> Tensor:
    """Return `pooled(x)`, and in a pass that continues a cache what it was in the first; `delta` has a block for it."""
    attend, value = scene().attention(delta), pooled(x, encoded)
    return value if attend is None or encoded else attend.once(0, value)


def places(x: Tensor) -> Tensor:
    """Return the number of each token of `x` `[batch, tokens, ..]` among the real ones of its row, int64, from 0.

    `[batch, tokens]`, or `[1, tokens]` where all rows have the same; what is not real has the number of the one before.
    """
    here = scene()
    if here.real is None or here.real.shape != x.shape[:2]:
        own = torch.arange(x.shape[1], device=x.device)[None]
    else:
        own = (here.real.long().cumsum(1) - 1).clamp(min=0)
    return own if here.before is None else own + here.before[:, None]


def task_numbers(x: Tensor, tasks: int, place: str) -> Tensor:
    """Return the number of each row's task, int64 `[batch]`, for `x` `[batch, ..]`; 0 where there is one task only.

    Raises:
        MethodError: no one said which rows belong to which of several tasks, or a number is too large.
    """
    found = scene().task
    if found is None and tasks == 1:
        return torch.zeros(len(x), dtype=torch.long, device=x.device)
    if found is None or (not torch.compiler.is_compiling() and int(found.max()) >= tasks):
        what = (
            "no one said which row belongs to which" if found is None else f"a row is said to be of {int(found.max())}"
        )
        raise MethodError(
            f"{place} has tasks 0 to {tasks - 1}, and {what}.",
            "Run inside `with peftree.context(model, task=[...]):`, one number a row.",
        )
    return found
