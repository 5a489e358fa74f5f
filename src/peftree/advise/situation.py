"""What the adviser looks at: the model's config and the data's rows."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftree import sites
from peftree.catalogue import Kind, Modality, task_facts
from peftree.data.exchange import shown
from peftree.data.picture import opened
from peftree.data.rows import Data
from peftree.plan import skeleton
from peftree.resolver import located
from peftree.tasks.loading import changed, tokenizer

SAMPLE = 2000  # rows whose tokens are counted
CHARACTERS = 4  # a token, where there is no tokenizer to count with; said with every figure made from it
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


@dataclass(frozen=True)
class ModelProfile:
    """A model, from its config.

    Attributes:
        name: the class that the task trains; parameters: the number of all its parameters.
        weights: their bytes in the smallest precision that a base is trained in.
        dtype: the config's own; empty if it names none.
        decoder: whether it generates text.
        positions: the number of tokens that it takes; 0 if unknown.
        side: the side in pixels that its images are resized to; patches: tokens per image; 0: it takes no images.
        towers: tower -> number of places that can be adapted; roles: their roles.
    """

    source: str
    name: str
    parameters: int
    weights: int
    dtype: str
    decoder: bool
    positions: int
    side: int
    patches: int
    towers: dict[str, int]
    roles: tuple[str, ...]


@dataclass(frozen=True)
class DataProfile:
    """Data, from its rows.

    Attributes:
        rows, valid, test: rows of each split; classes: None if there are none; smallest: rows of the rarest class.
        tokens: tokens per row: median, 95 %, 99 %, most; None if rows are not text.
        counted: whether a tokenizer counted them; otherwise they are estimated from characters.
        side: the side of the first image in pixels.
    """

    path: str
    task: str
    modality: Modality
    kind: Kind
    rows: int
    valid: int
    test: int
    classes: int = 0
    smallest: int = 0
    tokens: tuple[int, int, int, int] | None = None
    counted: bool = False
    side: int = 0
    notes: tuple[str, ...] = field(default=())


def model_profile(
    source: str, task: str, labels: int, image: int = 0, changes: Mapping[str, Any] | None = None
) -> ModelProfile:
    """Return the profile of a model for a task; no weights are read.

    Args:
        source: a model folder or hub name.
        task: the task to train it for; labels: the number of classes.
        image: the side in pixels to resize images to; 0: a run's default.
        changes: fields of the model's config to change.

    Raises:
        ConfigError: there is no config, it refuses a change, has no model for the task, or does not take images of that
            size.
    """
    config = changed(skeleton.read_config(source), changes or {})
    if labels:
        config.num_labels = labels
    kind = skeleton.model_class(config, task)
    model = skeleton.build(config, kind)
    found = sites.summary(model)
    towers: Counter[str] = Counter()
    for row in found:
        towers[row["tower"] or "model"] += row["count"]
    count = sum(p.numel() for p in model.parameters())
    text: Any = config.get_text_config()
    side = _side_of(source, config, task_facts(task).modality, image)
    own = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "").removeprefix("torch.")
    return ModelProfile(
        source, kind.__name__, count, 2 * count, own, task in ("generation", "captioning"),
        int(getattr(text, "max_position_embeddings", 0) or 0), side, _patches(config, side), dict(towers),
        tuple(dict.fromkeys(row["role"] for row in found)),
    )  # fmt: skip


def _side_of(source: str, config: Any, modality: Modality, image: int) -> int:
    """Return the size to which a run resizes images."""
    if modality == "language":
        return 0
    from peftree.data.images import read_look

    eye = config if modality == "vision" else config.vision_config
    return read_look(folder_of(source), Path(folder_of(source)).is_dir(), eye, image or None).size


def folder_of(source: str) -> str:
    """Return the folder of a model that is named by it, by its config.json or as a packaged model; or the hub name."""
    path = Path(located(source)).expanduser()
    return str(path.parent) if path.is_file() else str(path) if path.is_dir() else source


def _patches(config: Any, side: int) -> int:
    """Return the number of tokens that an image takes among those of the text."""
    patch = getattr(getattr(config, "vision_config", None), "patch_size", 0)
    if not isinstance(patch, int) or not patch:
        return 0
    whole = getattr(config, "vision_feature_select_strategy", "default") == "full"  # the class token stays
    return (side // patch) ** 2 + whole


def data_profile(path: str, data: Data, source: str) -> DataProfile:
    """Return the profile of the data that the model `source` will be trained on."""
    about = task_facts(data.task)
    counts = Counter(row.target for row in data.train) if data.labels else Counter()
    tokens, counted, notes = None, False, list(data.warnings)
    if about.modality != "vision":
        tokens, counted = _tokens(data, source)
        if not counted:
            notes.append(f"{source} has no tokenizer: tokens are estimated at {CHARACTERS} characters each")
    return DataProfile(
        path, data.task, about.modality, about.kind, len(data.train), len(data.valid), len(data.test),
        len(data.labels), min(counts.values(), default=0), tokens, counted,
        _side(data) if about.modality != "language" else 0, tuple(notes),
    )  # fmt: skip


def _tokens(data: Data, source: str) -> tuple[tuple[int, int, int, int], bool]:
    rows = list(data.train)
    rows = random.Random(0).sample(rows, SAMPLE) if len(rows) > SAMPLE else rows  # noqa: S311  no secret
    about = task_facts(data.task)
    texts = [about.text(row.source, row.target) for row in rows]
    counts, counted = _counts(texts, source)
    counts.sort()
    at = [counts[min(math.ceil(share * len(counts)), len(counts)) - 1] for share in (0.5, 0.95, 0.99, 1.0)]
    return (at[0], at[1], at[2], at[3]), counted


def _counts(texts: Sequence[str], source: str) -> tuple[list[int], bool]:
    folder = Path(folder_of(source))
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZERS):
        return [math.ceil(len(text) / CHARACTERS) + 1 for text in texts], False
    made = tokenizer(folder_of(source))
    return [len(ids) for ids in made(list(texts), truncation=False, verbose=False)["input_ids"]], True


def _side(data: Data) -> int:
    images = shown(data.train[0])
    if not images:
        return 0
    with opened(images[0]) as image:
        return int(max(image.size))
