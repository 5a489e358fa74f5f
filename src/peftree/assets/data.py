"""Demo data: real data sets out of registry packages, as plain rows and as files of a user's form.

Loaders return typed rows in a fixed order; `write_demo_data` writes small train, valid and test
files (CSV, JSONL or an image folder) from them.
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import itertools
import json
import random
import re
import tarfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from peftree.assets.fetch import ASSETS, ensure, make_folder
from peftree.errors import DataError, did_you_mean

Row = TypeVar("Row")
Images = npt.NDArray[np.uint8]
FORMAT = 1  # raised when the written rows change: folders are then written again
SPLITS = ("train", "valid", "test")

VADER_DOMAINS = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
}
# WordNet's lexicographer files, in the order of their two-digit numbers (lexnames(5WN)).
_LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
)
LEXNAMES = tuple(_LEXNAMES.split())
FASHION_CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
)


class Scored(NamedTuple):
    """A text and its mean human rating, from -4 (most negative) to 4."""

    text: str
    score: float


class Turn(NamedTuple):
    """One exchange of a conversation."""

    question: str
    answer: str


class Definition(NamedTuple):
    """One synonym set of WordNet: its first word, its definition, its lexicographer class."""

    word: str
    definition: str
    lexname: str


class Emoji(NamedTuple):
    """One emoji: its name in lower case, its category, and its PNG file of 64x64 pixels."""

    caption: str
    category: str
    subcategory: str
    path: Path


def vader(domain: str = "movies", quiet: bool = False) -> list[Scored]:
    """Return the human-rated sentences of `domain`: movies, products, tweets or editorials.

    Source: Hutto and Gilbert (2014), the data in the source package of vaderSentiment.

    Raises:
        DataError: unknown domain.
        AssetError: the package could not be fetched.
    """
    if domain not in VADER_DOMAINS:
        raise DataError(f"There is no domain '{domain}'.", did_you_mean(domain, VADER_DOMAINS))
    folder = ensure("vader", quiet)
    archive = next(folder.glob("*/additional_resources/hutto_ICWSM_2014.tar.gz"))
    name = f"hutto_ICWSM_2014/{VADER_DOMAINS[domain]}_GroundTruth.txt"
    with tarfile.open(archive) as source:
        member = source.extractfile(name)
        if member is None:
            raise DataError(f"{archive} has no file {name}.", "Delete the folder and run again.")
        return parse_vader(member.read().decode("utf-8", "replace"))


def parse_vader(text: str) -> list[Scored]:
    """Parse lines of identifier, score and sentence divided by tabs; HTML entities are resolved."""
    fields = (line.split("\t", 2) for line in text.splitlines())
    return [Scored(html.unescape(row[2]).strip(), float(row[1])) for row in fields if len(row) == 3]


def binary(rows: Sequence[Scored], margin: float = 0.5) -> list[tuple[str, str]]:
    """Return (text, "negative" or "positive") for rows with a score of at least `margin` in size.

    Texts that are equal but for case and spaces count once, and not at all if their labels differ.
    """
    labels: dict[str, set[str]] = {}
    texts: dict[str, str] = {}
    for text, score in rows:
        if abs(score) >= margin and text:
            key = " ".join(text.lower().split())
            labels.setdefault(key, set()).add("positive" if score > 0 else "negative")
            texts.setdefault(key, text)
    return [(texts[key], seen.pop()) for key, seen in labels.items() if len(seen) == 1]


def chatterbot(quiet: bool = False) -> list[Turn]:
    """Return the unique (question, answer) pairs of the English ChatterBot corpus, sorted."""
    import yaml

    folder = ensure("chatterbot", quiet) / "chatterbot_corpus" / "data" / "english"
    turns: set[Turn] = set()
    for file in sorted(folder.glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text("utf-8"))["conversations"]:
            if isinstance(conversation, list):  # a few are one bare line, with no answer
                lines = (str(line).strip() for line in conversation)
                turns.update(Turn(*pair) for pair in itertools.pairwise(lines))
    return sorted(turn for turn in turns if all(turn))


def wordnet_definitions(parts: Sequence[str] = ("noun", "verb"), quiet: bool = False) -> list[Definition]:
    """Return one row for each synonym set of the `parts` of speech (noun, verb, adj, adv)."""
    return [parse_synset(line)[0] for line in _synset_lines(parts, quiet)]


def wordnet_examples(
    parts: Sequence[str] = ("noun", "verb", "adj", "adv"), least: int = 6, quiet: bool = False
) -> list[str]:
    """Return the unique example sentences of at least `least` words: general text for retention."""
    found = (text for line in _synset_lines(parts, quiet) for text in parse_synset(line)[1])
    return list(dict.fromkeys(text for text in found if len(text.split()) >= least))


def _synset_lines(parts: Sequence[str], quiet: bool) -> list[str]:
    folder = ensure("wordnet", quiet) / "usr" / "share" / "wordnet"
    lines: list[str] = []
    for part in parts:
        if part not in ("noun", "verb", "adj", "adv"):
            raise DataError(
                f"WordNet has no part of speech '{part}'.",
                did_you_mean(part, ("noun", "verb", "adj", "adv")),
            )
        text = (folder / f"data.{part}").read_text("latin-1")
        lines += [line for line in text.splitlines() if not line.startswith("  ")]
    return lines


def parse_synset(line: str) -> tuple[Definition, list[str]]:
    """Parse a line of a WordNet data file (wndb(5WN)) into its definition and its examples."""
    data, _, gloss = line.partition(" | ")
    fields = data.split(" ")
    word = re.sub(r"\((a|p|ip)\)$", "", fields[4]).replace("_", " ")  # adjectives carry a marker
    definition = gloss.partition('; "')[0].strip().rstrip(";")
    examples = [text.strip() for text in re.findall(r'"([^"]+)"', gloss)]
    return Definition(word, definition, LEXNAMES[int(fields[1])]), examples


def fashion_mnist(split: str = "train", quiet: bool = False) -> tuple[Images, Images, tuple[str, ...]]:
    """Return images [N, 28, 28] and labels [N], both uint8, and the ten class names.

    `split` is "train" (60,000) or "test" (10,000).

    Raises:
        DataError: unknown split, or a damaged file.
    """
    if split not in ("train", "test"):
        raise DataError(f"There is no split '{split}'.", did_you_mean(split, ("train", "test")))
    folder = ensure("fashion-mnist", quiet) / "usr" / "share" / "datasets" / "fashion-mnist"
    stem = "train" if split == "train" else "t10k"
    images = parse_idx((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
    labels = parse_idx((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
    return images, labels, FASHION_CLASSES


def parse_idx(data: bytes) -> Images:
    """Parse a gzipped IDX file of unsigned bytes: magic 0 0 8 rank, the sizes, the values."""
    raw = gzip.decompress(data)
    if raw[:3] != b"\0\0\x08":
        raise DataError("This is not an IDX file of unsigned bytes.", "Fetch the data again.")
    rank = raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", rank, 4))
    values = np.frombuffer(raw, np.uint8, -1, 4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise DataError(f"The IDX file is cut: {values.size} values for {shape}.", "Fetch again.")
    return values.reshape(shape).copy()  # a buffer over bytes would be read-only


def emoji(quiet: bool = False) -> list[Emoji]:
    """Return the emoji that have an image, in Unicode's order, without skin-tone variations."""
    folder = ensure("emoji", quiet) / "package"
    entries = json.loads((folder / "emoji.json").read_text("utf-8"))
    rows = []
    for entry in sorted(entries, key=lambda entry: int(entry["sort_order"])):
        path = folder / "img" / "google" / "64" / entry["image"]
        if entry["category"] != "Component" and entry["has_img_google"] and path.is_file():
            name = entry["name"] or entry["short_name"].replace("_", " ")
            rows.append(Emoji(name.lower(), entry["category"], entry["subcategory"], path))
    return rows


def write_demo_data(
    folder: str | Path, task: str, sizes: Mapping[str, int], seed: int = 0, quiet: bool = False
) -> Path:
    """Write small real data files in the form a user would have, and return `folder`.

    ``text-classification``: train.csv, valid.csv, test.csv with columns text, label (movie
    reviews, "negative" or "positive"). ``generation``: train.jsonl, ... with prompt, completion
    (WordNet definitions; no word and no synonym set is in two files). ``image-classification``:
    train/<class>/<id>.png, ... (Fashion-MNIST). Classes keep their share in every split, no row
    is in two splits, and the same arguments write the same bytes.

    Args:
        folder: is made; if it was written by an earlier call with other arguments, it is replaced.
        task: one of the three above.
        sizes: rows of train, valid and test.
        seed: decides which rows are drawn.
        quiet: show no progress line.

    Raises:
        DataError: unknown task or split, or more rows asked for than there are.
        AssetError: the data could not be fetched, or `folder` holds files of someone else.
    """
    if task not in _WRITERS:
        raise DataError(f"There is no demo data for '{task}'.", did_you_mean(task, _WRITERS))
    for split in sizes:
        if split not in SPLITS or sizes[split] < 1:
            raise DataError(
                f"'{split}: {sizes[split]}' is not a split and its size.",
                f"Give one or more rows for each of: {', '.join(SPLITS)}.",
            )
    asset, write = _WRITERS[task]
    ensure(asset, quiet)
    ordered = {split: sizes[split] for split in SPLITS if split in sizes}
    key = json.dumps([FORMAT, task, ordered, seed, ASSETS[asset].sha256])

    def build(new: Path) -> None:
        write(new, ordered, random.Random(seed))

    return make_folder(Path(folder).absolute(), key, build, f"writing data for {task}", quiet)


def stratified(
    rows: Sequence[Row],
    label: Callable[[Row], Hashable],
    sizes: Mapping[str, int],
    rng: random.Random,
) -> dict[str, list[Row]]:
    """Draw disjoint random splits of `rows` in which each label keeps its share.

    Raises:
        DataError: fewer rows than the sizes ask for.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    placed: list[tuple[float, int, Row]] = []
    for number, group in enumerate(groups.values()):
        rng.shuffle(group)
        # Spread each group evenly over 0..1: any slice of the whole then has every group's share.
        placed += [((i + 0.5) / len(group), number, row) for i, row in enumerate(group)]
    placed.sort(key=lambda item: item[:2])
    total = sum(sizes.values())
    if total > len(placed):
        raise DataError(f"{total:,} rows asked for, {len(placed):,} there.", "Ask for fewer.")
    splits, start = {}, 0
    for split, size in sizes.items():
        splits[split] = [row for _, _, row in placed[start : start + size]]
        rng.shuffle(splits[split])
        start += size
    return splits


def _write_texts(folder: Path, sizes: Mapping[str, int], rng: random.Random) -> None:
    rows = binary(vader("movies", quiet=True))
    for split, chosen in stratified(rows, lambda row: row[1], sizes, rng).items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("text", "label"), *chosen])
        (folder / f"{split}.csv").write_text(text.getvalue(), "utf-8")


def _write_definitions(folder: Path, sizes: Mapping[str, int], rng: random.Random) -> None:
    rows = plain_definitions(wordnet_definitions(quiet=True))
    for split, chosen in stratified(rows, lambda row: row.lexname, sizes, rng).items():
        pairs = ({"prompt": f"Define the word: {row.word}.", "completion": row.definition} for row in chosen)
        lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
        (folder / f"{split}.jsonl").write_text("".join(lines), "utf-8")


def plain_definitions(rows: Sequence[Definition]) -> list[Definition]:
    """Keep single lower-case words with a definition of 3 to 30 words; each of both only once."""
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


def _write_images(folder: Path, sizes: Mapping[str, int], rng: random.Random) -> None:
    from PIL import Image

    sources = {"train": ("train", "valid"), "test": ("test",)}
    for source, splits in sources.items():
        images, labels, names = fashion_mnist(source, quiet=True)
        wanted = {split: sizes[split] for split in splits if split in sizes}
        rows = list(enumerate(labels.tolist()))
        for split, chosen in stratified(rows, lambda row: row[1], wanted, rng).items():
            for index, label in chosen:
                path = folder / split / names[label] / f"{index:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).save(path)


_WRITERS: dict[str, tuple[str, Callable[[Path, Mapping[str, int], random.Random], None]]] = {
    "text-classification": ("vader", _write_texts),
    "generation": ("wordnet", _write_definitions),
    "image-classification": ("fashion-mnist", _write_images),
}
