"""Tokens of a vision transformer as the square grid of patches they came from."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

from peftree.errors import MethodError


def over_grid(x: Tensor, lead: int, change: Callable[[Tensor], Tensor], name: str) -> Tensor:
    """Return `x` `[batch, lead + n n, w]` with `change` applied to its patches as an image, and to each lead.

    Args:
        lead: tokens before the patches; each is changed as an image of one pixel.
        change: maps images `[batch, w, rows, columns]` to images of that shape.
        name: the name of the site, for the error.

    Raises:
        MethodError: the tokens after `lead` do not form a square.
    """
    n = isqrt(max(x.shape[1] - lead, 0))
    if x.shape[1] != lead + n * n or not n:
        raise MethodError(
            f"{name} sees {x.shape[1]} tokens, which are not {lead} and a square grid of patches.",
            "Set `lead` to the number of tokens before the patches, and give the model square images.",
        )
    first, rest = x[:, :lead], x[:, lead:]
    image = change(rest.mT.unflatten(2, (n, n))).flatten(2).mT
    pixels = change(first.flatten(0, 1)[:, :, None, None]).flatten(1).view_as(first) if lead else first
    return torch.cat([pixels, image], 1)
