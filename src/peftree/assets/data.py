"""Real data sets as files that a user would have: train, valid and test as CSV, JSONL or folders of images.

`write_data` draws disjoint splits from one packaged source; the loaders of `sources` give the plain rows.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from peftree.assets.fetch import ensure, make_folder
from peftree.assets.sources import (
    FASHION_CLASSES,
    INTERFACES,
    VADER_DOMAINS,
    Definition,
    Emoji,
    Translation,
    Turn,
    binary,
    chatterbot,
    concept,
    emoji,
    fashion_mnist,
    interface,
    labelled_examples,
    plain,
    unique,
    vader,
    wordnet_definitions,
)
from peftree.assets.table import ASSETS
from peftree.errors import DataError, did_you_mean
from peftree.files import sha256

# Loaders that are asked for here too; the others are in `sources`.
__all__ = ["SOURCES", "fashion_mnist", "grouped", "stratified", "write_data"]

Row = TypeVar("Row")
Sizes = Mapping[str, int]
FORMAT = 3  # raised when the written rows change: folders are then written again
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Source:
    """A packaged data set that can be written as files.

    Attributes:
        asset: the archive it comes from.
        about: what the rows are, and for which task.
        options: its options, with their defaults.
        write: writes the splits into a folder.
    """

    asset: str
    about: str
    write: Callable[[Path, Sizes, random.Random, Mapping[str, Any]], None]
    options: Mapping[str, Any] = field(default_factory=dict)


def write_data(
    folder: str | Path, source: str, options: Mapping[str, Any], sizes: Sizes, seed: int = 0, quiet: bool = False
) -> Path:
    """Write small files of real data, in the form that a user would have, and return `folder`.

    No row, text, word or concept is in two splits, classes keep their share in each split, and the
    same arguments write the same bytes.

    Args:
        folder: created if needed; if an earlier call with other arguments wrote it, it is replaced.
        source: a name of `SOURCES`.
        options: options of the source; the others keep their defaults.
        sizes: number of rows of train, valid and test.
        seed: decides which rows are drawn.
        quiet: show no progress line.

    Raises:
        DataError: the source, an option or a split is unknown, or there are too few rows.
        AssetError: the data could not be fetched, or `folder` holds other files.
    """
    if source not in SOURCES:
        raise DataError(f"There is no data source '{source}'.", did_you_mean(source, SOURCES))
    chosen = SOURCES[source]
    settings = _settings(source, options)
    for split in sizes:
        if split not in SPLITS or sizes[split] < 1:
            raise DataError(
                f"'{split}: {sizes[split]}' is not a split and its size.",
                f"Give a size of at least 1 for each of: {', '.join(SPLITS)}.",
            )
    ensure(chosen.asset, quiet)
    ordered = {split: sizes[split] for split in SPLITS if split in sizes}
    key = json.dumps([FORMAT, source, settings, ordered, seed, ASSETS[chosen.asset].sha256], sort_keys=True)

    def build(new: Path) -> None:
        chosen.write(new, ordered, random.Random(seed), settings)

    return make_folder(Path(folder).absolute(), key, build, f"writing the data {source}", quiet)


def _settings(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a source with its defaults; each must have its default's type."""
    defaults = SOURCES[source].options
    for name, value in options.items():
        if name not in defaults:
            raise DataError(f"The data source '{source}' has no option '{name}'.", did_you_mean(name, defaults))
        kind = type(defaults[name])
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise DataError(f"{source}: {name}: {value!r} is not a {kind.__name__}.", f"Default: {defaults[name]!r}.")
    return {**defaults, **options}


def stratified(
    rows: Sequence[Row], label: Callable[[Row], Hashable], sizes: Sizes, rng: random.Random
) -> dict[str, list[Row]]:
    """Draw disjoint random splits of `rows` in which each label keeps its share.

    Raises:
        DataError: there are fewer rows than the sizes ask for.
    """
    placed = _spread(rows, label, rng)
    total = sum(sizes.values())
    if total > len(placed):
        raise DataError(f"{total:,} rows asked for, only {len(placed):,} exist.", "Ask for fewer.")
    splits, start = {}, 0
    for split, size in sizes.items():
        splits[split] = placed[start : start + size]
        rng.shuffle(splits[split])
        start += size
    return splits


def grouped(
    rows: Sequence[Row], keys: Callable[[Row], Iterable[Hashable]], label: Callable[[Row], Hashable], sizes: Sizes,
    rng: random.Random,
) -> dict[str, list[Row]]:  # fmt: skip
    """Draw as `stratified` does, with all rows that share a key, directly or through others, in one split.

    Raises:
        DataError: there are fewer rows than the sizes ask for, once groups are kept together.
    """
    left = _spread(_joined(rows, keys), lambda group: label(group[0]), rng)
    splits: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        splits[split], rest = [], []
        for group in left:
            fits = len(splits[split]) + len(group) <= size
            if fits:
                splits[split] += group
            else:
                rest.append(group)
        if len(splits[split]) < size:
            raise DataError(f"{split}: {size:,} rows asked for, only {len(splits[split]):,} exist.", "Ask for fewer.")
        rng.shuffle(splits[split])
        left = rest
    return splits


def _spread(rows: Sequence[Row], label: Callable[[Row], Hashable], rng: random.Random) -> list[Row]:
    """Return the rows in a random order in which any stretch has each label's share."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    placed: list[tuple[float, int, Row]] = []
    for number, group in enumerate(groups.values()):
        rng.shuffle(group)
        placed += [((i + 0.5) / len(group), number, row) for i, row in enumerate(group)]
    return [row for *_, row in sorted(placed, key=lambda item: item[:2])]


def _joined(rows: Sequence[Row], keys: Callable[[Row], Iterable[Hashable]]) -> list[list[Row]]:
    """Return the rows in groups: two rows with a common key are in the same group."""
    from scipy.cluster.hierarchy import DisjointSet

    joined, first = DisjointSet(range(len(rows))), dict[Hashable, int]()
    for i, row in enumerate(rows):
        for key in keys(row):
            joined.merge(i, first.setdefault(key, i))
    groups: dict[int, list[Row]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(joined[i], []).append(row)
    return list(groups.values())


def _tables(folder: Path, header: tuple[str, str], splits: Mapping[str, Iterable[tuple[Any, Any]]]) -> None:
    for split, rows in splits.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        (folder / f"{split}.csv").write_text(text.getvalue(), "utf-8")


def _lines(path: Path, names: tuple[str, str], rows: Iterable[tuple[str, str]]) -> None:
    lines = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")


def _ratings(domain: str, folder: Path, sizes: Sizes, rng: random.Random, options: Mapping[str, Any]) -> None:
    rows = vader(domain, quiet=True)
    if options["task"] == "text-classification":
        labelled = binary(rows, options["margin"])
        _tables(folder, ("text", "label"), stratified(labelled, lambda row: row[1], sizes, rng))
    elif options["task"] == "text-regression":
        rated = unique((row.text, row.score) for row in rows if row.text)
        _tables(folder, ("text", "score"), stratified(rated, lambda row: round(row[1]), sizes, rng))
    else:
        known = ("text-classification", "text-regression")
        raise DataError(f"{domain}: task: {options['task']!r} is not one of its tasks.", f"Use {' or '.join(known)}.")


def _glosses(folder: Path, sizes: Sizes, rng: random.Random, options: Mapping[str, Any]) -> None:
    _classes(folder, unique((row.definition, row.lexname) for row in wordnet_definitions(("noun",), True)), sizes, rng)


def _examples(folder: Path, sizes: Sizes, rng: random.Random, options: Mapping[str, Any]) -> None:
    _classes(folder, unique(labelled_examples(quiet=True)), sizes, rng)


def _classes(folder: Path, rows: list[tuple[str, str]], sizes: Sizes, rng: random.Random) -> None:
    """Write texts with one of many classes; classes too rare to get a training row are left out."""
    while True:
        splits = stratified(rows, lambda row: row[1], sizes, rng)
        known = {label for _, label in splits.get("train", rows)}
        rare = {label for part in splits.values() for _, label in part} - known
        if not rare:
            break
        rows = [row for row in rows if row[1] not in rare]
    _tables(folder, ("text", "label"), splits)


def _definitions(folder: Path, sizes: Sizes, rng: random.Random, options: Mapping[str, Any]) -> None:
    rows = plain_definitions(wordnet_definitions(quiet=True))
    for split, chosen in stratified(rows, lambda row: row.lexname, sizes, rng).items():
        pairs = ((f"Define the word: {row.word}.", f" {row.definition}") for row in chosen)
        _lines(folder / f"{split}.jsonl", ("prompt", "completion"), pairs)


def plain_definitions(rows: Sequence[Definition]) -> list[Definition]:
    """Keep single lower-case words with a definition of 3 to 30 words; each word and definition only once."""
    words: set[str] = set()
    definitions: set[str] = set()
    kept = []
    for row in rows:
        fits = re.fullmatch("[a-z]{2,}", row.word) and 3 <= len(row.definition.split()) <= 30
        if fits and row.word not in words and row.definition not in definitions:
            words.add(row.word)
            definitions.add(row.definition)
            kept.append(row)
    return kept


def _chat(folder: Path, sizes: Sizes, rng: random.Random, options: Mapping[str, Any]) -> None:
    rows = chatterbot(quiet=True)

    def keys(turn: Turn) -> tuple[str, str]:
        return f"question {plain(turn.question)}", f"answer {plain(turn.answer)}"

    for split, chosen in grouped(rows, keys, lambda _: 0, sizes, rng).items():
        pairs = ((f"{row.question}\n", row.answer) for row in chosen)
        _lines(folder / f"{split}.jsonl", ("prompt", "completion"), pairs)


def _interface(language: str, folder: Path, sizes: Sizes, rng: random.Random, options: Mapping[str, Any]) -> None:
    rows = interface(language, quiet=True)

    def keys(row: Translation) -> tuple[str, str]:
        return f"english {_letters(row.english)}", f"other {_letters(row.other)}"

    for split, chosen in grouped(rows, keys, lambda _: 0, sizes, rng).items():
        _lines(folder / f"{split}.jsonl", ("prompt", "completion"), chosen)


def _letters(text: str) -> str:
    """Return a text without digits and signs: texts that differ only in these are near-duplicates."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower())) or plain(text)


def _fashion(folder: Path, sizes: Sizes, rng: random.Random, options: Mapping[str, Any]) -> None:
    from PIL import Image

    classes = options["classes"] or list(FASHION_CLASSES)
    for name in classes:
        if name not in FASHION_CLASSES:
            raise DataError(f"fashion-mnist has no class {name!r}.", did_you_mean(str(name), FASHION_CLASSES))
    parts = {"train": ("train", "valid"), "test": ("test",)}
    for part, splits in parts.items():
        images, labels, names = fashion_mnist(part, quiet=True)
        wanted = {split: sizes[split] for split in splits if split in sizes}
        rows = [(index, label) for index, label in enumerate(labels.tolist()) if names[label] in classes]
        for split, chosen in stratified(rows, lambda row: row[1], wanted, rng).items():
            for index, label in chosen:
                path = folder / split / names[label] / f"{index:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).save(path)


def _emoji(form: str, folder: Path, sizes: Sizes, rng: random.Random, options: Mapping[str, Any]) -> None:
    """Write emoji on white: for `form` classes one folder per category, for pairs one with metadata.jsonl."""
    rows = emoji(quiet=True)
    known = sorted({row.category for row in rows})
    for name in options["categories"]:
        if name not in known:
            raise DataError(f"emoji has no category {name!r}.", did_you_mean(str(name), known))
    rows = [row for row in rows if row.category in (options["categories"] or known)]

    def keys(row: Emoji) -> tuple[str, ...]:
        return (*concept(row), sha256(row.path.read_bytes()))  # a few flags are the same picture

    for split, chosen in grouped(rows, keys, lambda row: row.category, sizes, rng).items():
        (folder / split).mkdir()
        for row in chosen:
            name = f"{row.path.stem}.png" if form == "pairs" else f"{_slug(row.category)}/{row.path.stem}.png"
            _on_white(row.path, folder / split / name)
        if form == "pairs":
            pairs = ((f"{row.path.stem}.png", row.caption) for row in chosen)
            _lines(folder / split / "metadata.jsonl", ("file_name", "text"), pairs)


def _slug(name: str) -> str:
    return re.sub("[^a-z]+", "-", name.lower())


def _on_white(source: Path, target: Path) -> None:
    from PIL import Image

    target.parent.mkdir(exist_ok=True)
    with Image.open(source) as file:
        image = file.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    Image.alpha_composite(white, image).convert("RGB").save(target)


_RATED: Mapping[str, Any] = {"task": "text-classification", "margin": 0.5}
_SHOWN: Mapping[str, Any] = {"categories": []}  # empty: all
_ABOUT = "sentences with a human rating of their sentiment: text-classification or text-regression"
SOURCES: dict[str, Source] = {
    **{name: Source("vader", f"{name}: {_ABOUT}", partial(_ratings, name), _RATED) for name in VADER_DOMAINS},
    "glosses": Source("wordnet", "definition of a noun, its class of 26: text-classification", _glosses),
    "examples": Source("wordnet", "general sentences, the class of the word they show: for retention", _examples),
    "definitions": Source("wordnet", "word and definition: generation", _definitions),
    "chat": Source("chatterbot", "question and answer: generation", _chat),
    **{
        f"interface-{name}": Source(
            f"libreoffice-{name}", f"English and {there}, of an interface: generation", partial(_interface, name)
        )
        for name, there in INTERFACES.items()
    },
    "fashion-mnist": Source("fashion-mnist", "clothing, ten classes: image folders", _fashion, {"classes": []}),
    "emoji": Source("emoji", "emoji, nine categories: image folders", partial(_emoji, "classes"), _SHOWN),
    "emoji-pairs": Source("emoji", "emoji and their names: images with texts", partial(_emoji, "pairs"), _SHOWN),
}
