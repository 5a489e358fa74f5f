"""Loaders of real data sets from registry packages: typed rows in a fixed order."""

from __future__ import annotations

import gzip
import html
import itertools
import json
import re
import struct
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from peftree.assets.fetch import ensure
from peftree.errors import DataError, did_you_mean

Images = npt.NDArray[np.uint8]
Target = TypeVar("Target")
INTERFACES = {"es": "Spanish", "pt-br": "Brazilian Portuguese"}
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
PARTS = ("noun", "verb", "adj", "adv")  # of speech
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


class Translation(NamedTuple):
    """A text of a program's interface, and its translation to another language."""

    english: str
    other: str


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
        DataError: the domain is unknown.
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
    """Parse lines of identifier, score and sentence separated by tabs; HTML entities are resolved."""
    fields = (line.split("\t", 2) for line in text.splitlines())
    return [Scored(html.unescape(row[2]).strip(), float(row[1])) for row in fields if len(row) == 3]


def binary(rows: Sequence[Scored], margin: float = 0.5) -> list[tuple[str, str]]:
    """Return (text, "negative" or "positive") for rows with a score of at least `margin` in size; see `unique`."""
    return unique((t, "positive" if s > 0 else "negative") for t, s in rows if abs(s) >= margin and t)


def unique(pairs: Iterable[tuple[str, Target]]) -> list[tuple[str, Target]]:
    """Return the pairs of text and target, each text once.

    Texts that differ only in case and spaces count once, and not at all if their targets differ.
    """
    targets: dict[str, set[Target]] = {}
    texts: dict[str, str] = {}
    for text, target in pairs:
        targets.setdefault(plain(text), set()).add(target)
        texts.setdefault(plain(text), text)
    return [(texts[key], seen.pop()) for key, seen in targets.items() if len(seen) == 1]


def plain(text: str) -> str:
    """Return `text` in lower case with single spaces, which identifies it."""
    return " ".join(text.lower().split())


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


def interface(language: str, quiet: bool = False) -> list[Translation]:
    """Return the texts of LibreOffice's interface with their human translations, each English text once; see `clean`.

    `language` is "es" or "pt-br". An English text with several translations keeps the shortest, the
    first in the alphabet among equals.

    Raises:
        DataError: the language is unknown.
        AssetError: the package could not be fetched.
    """
    if language not in INTERFACES:
        raise DataError(f"There is no interface in '{language}'.", did_you_mean(language, INTERFACES))
    folder = ensure(f"libreoffice-{language}", quiet) / "usr" / "lib" / "libreoffice" / "program" / "resource"
    pairs = (clean(*pair) for file in folder.glob("*/LC_MESSAGES/*.mo") for pair in parse_mo(file.read_bytes()))
    rows: dict[str, Translation] = {}
    for row in sorted((pair for pair in pairs if pair), key=lambda row: (len(row.other), row)):
        rows.setdefault(plain(row.english), row)
    return sorted(rows.values())


def clean(english: str, other: str) -> Translation | None:
    """Return an entry as plain text, or None if it is not a sentence or phrase of 4 to 40 words without markup.

    The signs `~` and `_`, which mark a shortcut's letter, are removed. Entries with placeholders (`%1`,
    `$(ARG)`, `{0}`), tags, or a translation that is the English text itself, are left out.
    """
    one, two = (" ".join(re.sub("[~_]", "", text).split()) for text in (english, other))
    words = 4 <= len(one.split()) <= 40 and 1 <= len(two.split()) <= 60
    return Translation(one, two) if words and one != two and not re.search(r"[<>%$#\\{}]", one + two) else None


def parse_mo(data: bytes) -> list[tuple[str, str]]:
    """Parse a gettext catalogue (gettext manual, section 10.3) into pairs of text and translation, in its order.

    The context before a text is left out, and so are entries with plural forms and the header, whose text is empty.

    Raises:
        DataError: it is not a little-endian catalogue, or it is truncated.
    """
    try:
        magic, _, count, texts, translations = struct.unpack_from("<5I", data)
        if magic != 0x950412DE:
            raise DataError("This is not a gettext catalogue.", "Fetch the data again.")
        places = [
            struct.unpack_from("<2I", data, table + 8 * i) for i in range(count) for table in (texts, translations)
        ]
    except struct.error as error:
        raise DataError(f"The catalogue is truncated: {error}.", "Fetch the data again.") from None
    entries = [data[start : start + size].decode() for size, start in places]
    pairs = ((key.rpartition("\x04")[2], value) for key, value in zip(entries[::2], entries[1::2], strict=True))
    return [(key, value) for key, value in pairs if key and "\0" not in key]


def wordnet_definitions(parts: Sequence[str] = ("noun", "verb"), quiet: bool = False) -> list[Definition]:
    """Return one row for each synonym set of the `parts` of speech (noun, verb, adj, adv)."""
    return [parse_synset(line)[0] for line in _synset_lines(parts, quiet)]


def wordnet_examples(quiet: bool = False) -> list[str]:
    """Return the unique example sentences of six words or more: general text for retention."""
    return [text for text, _ in labelled_examples(quiet=quiet)]


def labelled_examples(parts: Sequence[str] = PARTS, least: int = 6, quiet: bool = False) -> list[tuple[str, str]]:
    """Return the example sentences of at least `least` words, each with the class that it first comes with."""
    found: dict[str, str] = {}
    for line in _synset_lines(parts, quiet):
        row, texts = parse_synset(line)
        for text in texts:
            if len(text.split()) >= least:
                found.setdefault(text, row.lexname)
    return list(found.items())


def _synset_lines(parts: Sequence[str], quiet: bool) -> list[str]:
    folder = ensure("wordnet", quiet) / "usr" / "share" / "wordnet"
    lines: list[str] = []
    for part in parts:
        if part not in PARTS:
            raise DataError(f"WordNet has no part of speech '{part}'.", did_you_mean(part, PARTS))
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
        DataError: the split is unknown, or a file is damaged.
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
        raise DataError(f"The IDX file is truncated: {values.size} values for {shape}.", "Fetch again.")
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


def concept(row: Emoji) -> tuple[str, str]:
    """Return two keys for what an emoji shows; "man farmer" and "woman farmer" share them, as do families.

    One is its name, the other its code points, both without gender and direction. Emoji that share
    either are near-duplicates.
    """
    name = re.sub(_PEOPLE, "person", row.caption.removesuffix(" facing right"))
    codes = ["person" if code in _PERSONS else code for code in row.path.stem.split("-") if code not in _SIGNS]
    return f"name {'family' if row.subcategory == 'family' else name}", f"code {'-'.join(dict.fromkeys(codes))}"


_PEOPLE = re.compile(r"\b(man|woman|men|women|boy|girl|child|adult|male|female)\b")
_PERSONS = frozenset("1f466 1f467 1f468 1f469 1f9d1 1f9d2".split())
_SIGNS = frozenset("200d fe0f 2640 2642 27a1".split())  # joiners, the signs of gender, and "facing right"
