"""Rows with the images of other rows: the control for whether a model looks at an image at all."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from peftree.data.picture import content
from peftree.data.rows import Example
from peftree.files import sha256


def shown(row: Example) -> tuple[str, ...]:
    """Return the images of a row of a task that reads images, in their order."""
    return tuple(image for turn in row.turns for image in turn.images) if row.turns else (row.source,)


def same(row: Example) -> tuple[str, ...]:
    """Return what the images of a row are known by: the hashes of their files."""
    return tuple(sha256(content(image)) for image in shown(row))


def partners(keys: Sequence[Sequence[Hashable]], seed: int = 0) -> dict[int, int]:
    """Return for each row that takes part the row whose images it gets; each gives its own once.

    No row gets the images that it has, also not from another row that has the same ones. Rows exchange with rows of as
    many images; those without take no part. If the same images are in more than half of such rows, as many of these
    take part as there are others.

    Args:
        keys: what the images of each row are known by; see `same`.
        seed: draws who exchanges with whom.

    >>> partners([["a"], ["a"], ["b"], ["c"], []])
    {0: 3, 1: 2, 2: 1, 3: 0}
    """
    drawn = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    groups: dict[int, dict[tuple[Hashable, ...], list[int]]] = {}
    for row in drawn:
        groups.setdefault(len(keys[row]), {}).setdefault(tuple(keys[row]), []).append(row)
    groups.pop(0, None)
    out: dict[int, int] = {}
    for alike in groups.values():
        most = max(alike.values(), key=len)
        del most[sum(map(len, alike.values())) - len(most) :]
        order = [row for rows in alike.values() for row in rows]
        step = max(map(len, alike.values()))  # rows of the same images are side by side, so that far are others
        out |= dict(zip(order, order[step:] + order[:step], strict=True))
    return dict(sorted(out.items()))


def given(row: Example, other: Example) -> Example:
    """Return `row` with the images of `other`, which has as many."""
    if not row.turns:
        return row._replace(source=other.source)
    images = iter(shown(other))
    return row._replace(turns=tuple(t._replace(images=tuple(next(images) for _ in t.images)) for t in row.turns))
