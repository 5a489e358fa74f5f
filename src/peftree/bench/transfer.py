"""Continual learning: what a sequence of tasks keeps, from the matrix of scores after each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftree.errors import DataError


@dataclass(frozen=True)
class Transfer:
    """Summary of a sequence; positive is good.

    Attributes:
        final: mean score over all tasks after the last stage.
        backward: mean change of each earlier task from its own stage to the end; negative is forgetting.
        forward: mean gain of each later task just before its own stage, over its score before
            any training; None if that was not measured.
    """

    final: float
    backward: float
    forward: float | None


def transfer(scores: Sequence[Sequence[float]], *, higher_is_better: bool = True) -> Transfer:
    """Return backward and forward transfer (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, equations 2-4).

    Args:
        scores: ``[stage][task]``, after training on task 0, 1, ...; an extra first row is the
            score before any training, without which forward transfer is unknown.
        higher_is_better: if False, the signs of both transfers are flipped.

    Raises:
        DataError: the rows are not T or T + 1 rows of T >= 2 scores.
    """
    lengths = {len(row) for row in scores}
    tasks = lengths.pop() if len(lengths) == 1 else 0
    if tasks < 2 or len(scores) not in (tasks, tasks + 1):
        raise DataError(
            f"A sequence of {len(scores)} stages over {tasks or 'unequal numbers of'} tasks has no transfer.",
            "Give one row of scores per stage, and at most one before the first.",
        )
    start = np.asarray(scores[0], dtype=np.float64) if len(scores) == tasks + 1 else None
    after = np.asarray(scores[-tasks:], dtype=np.float64)
    sign = 1.0 if higher_is_better else -1.0
    backward = sign * float(np.mean(after[-1, :-1] - np.diag(after)[:-1]))
    ahead = [after[i - 1, i] for i in range(1, tasks)]
    forward = None if start is None else sign * float(np.mean(np.asarray(ahead) - start[1:]))
    return Transfer(float(after[-1].mean()), backward, forward)
