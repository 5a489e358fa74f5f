"""What a delta gets from the scene: the rows of its tokens, their places and ids, a summary of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from peftree.deltas.scene import scene
from peftree.deltas.verbs import Delta
from peftree.errors import MethodError


def pooled(x: Tensor, encoded: bool = False) -> Tensor:
    """Return the mean of `x` `[batch, tokens, d]` over the tokens of the prompt, `[batch, d]`; 0 if there is none.

    If the scene knows no prompt (images), it is the mean of all tokens.

    Args:
        x: values of the tokens of this pass.
        encoded: whether they are the encoder's, which a decoder sees.
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
    """Return `x` `[batch, .., d]` as `[batch, tokens, d]`; inside experts, it is `[batch * tokens, d]`.

    Raises:
        MethodError: `x` holds some of the tokens, and their rows are unknown.
    """
    shape = scene().shape
    if x.dim() > 2:
        return x.flatten(1, -2)
    if shape is None or shape[0] * shape[1] != len(x):
        raise MethodError(
            f"{place} sees tokens without their rows, so it cannot look at the rest of their text.",
            "Leave out the sites inside experts.",
        )
    return x.view(*shape, -1)


def token_ids(place: str) -> Tensor:
    """Return the ids of the tokens of this pass, int64 `[batch, tokens]`, -1 for virtual ones.

    Raises:
        MethodError: the model was given embeddings, not ids.
    """
    found = scene().ids
    if found is None:
        raise MethodError(
            f"{place} changes tokens by their ids, but the model was called without ids.",
            "Pass input_ids, or leave `ids` empty to choose tokens by place.",
        )
    return found


def summary(delta: Delta, x: Tensor, encoded: bool = False) -> Tensor:
    """Return `pooled(x)`, or its value in the first pass if this one continues a cache; `delta` has a block for it."""
    if not delta.blocks:
        raise TypeError(f"{type(delta).__name__} must set blocks = 1: its summary of the first pass is kept there.")
    attend, value = scene().attention(delta), pooled(x, encoded)
    return value if attend is None or encoded else attend.once(0, value)


def places(x: Tensor) -> Tensor:
    """Return the number of each token of `x` `[batch, tokens, ..]` among the real ones of its row, int64, from 0.

    `[batch, tokens]`, or `[1, tokens]` if all rows have the same; a token that is not real has the previous number.
    """
    here = scene()
    if here.real is None or here.real.shape != x.shape[:2]:
        own = torch.arange(x.shape[1], device=x.device)[None]
    else:
        own = (here.real.long().cumsum(1) - 1).clamp(min=0)
    return own if here.before is None else own + here.before[:, None]


def task_numbers(x: Tensor, tasks: int, place: str) -> Tensor:
    """Return the number of each row's task, int64 `[batch]`, for `x` `[batch, ..]`; 0 if there is only one task.

    Raises:
        MethodError: the tasks of the rows were not set, or a number is too large.
    """
    found = scene().task
    if found is None and tasks == 1:
        return torch.zeros(len(x), dtype=torch.long, device=x.device)
    if found is None or (not torch.compiler.is_compiling() and int(found.max()) >= tasks):
        what = "no row has one" if found is None else f"a row has task {int(found.max())}"
        raise MethodError(
            f"{place} has tasks 0 to {tasks - 1}, but {what}.",
            "Run inside `with peftree.context(model, task=[...]):`, one number per row.",
        )
    return found
