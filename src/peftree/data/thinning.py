"""Fewer training rows, or wrong labels in them, for curves over data and for robustness."""

from __future__ import annotations

import random
from dataclasses import replace

from peftree.data.rows import Data, load_data
from peftree.errors import ConfigError
from peftree.settings import RunConfig


def rows_of(config: RunConfig) -> Data:
    """Return the rows that a run's settings name, checked; see `load_data` and `thinned`."""
    files = config.data.model_dump(exclude={"share", "label_noise"})
    data = load_data(**files, task=config.task, seed=config.seed)
    return thinned(data, config.data.share, config.data.label_noise)


def thinned(data: Data, share: float = 1.0, label_noise: float = 0.0) -> Data:
    """Return `data` with a share of its training rows, and wrong labels on some of those.

    Which rows and labels depends only on the data: the rows of a smaller share are among those of
    a larger one, and each class (if there are classes) keeps its share and at least one row, so
    every method sees the same rows.

    Args:
        data: checked rows.
        share: share of the training rows, 0 < share <= 1.
        label_noise: share of the labels to replace by another class, drawn uniformly.

    Raises:
        ConfigError: label noise is asked for on a task without classes.
    """
    rows = list(data.train)
    rng = random.Random(0)
    if share < 1:
        order = rng.sample(range(len(rows)), len(rows))
        groups: dict[str, list[int]] = {}
        for index in order:
            groups.setdefault(rows[index].target if data.labels else "", []).append(index)
        kept = {i for group in groups.values() for i in group[: max(1, round(share * len(group)))]}
        rows = [row for index, row in enumerate(rows) if index in kept]
    if label_noise:
        if len(data.labels) < 2:
            raise ConfigError(
                f"label_noise={label_noise:g}: the task {data.task} has no classes.", "Set data.label_noise: 0."
            )
        for index in rng.sample(range(len(rows)), round(label_noise * len(rows))):
            others = [label for label in data.labels if label != rows[index].target]
            rows[index] = rows[index]._replace(target=rng.choice(others))
    return replace(data, train=tuple(rows))
