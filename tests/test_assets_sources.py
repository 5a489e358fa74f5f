"""Every packaged data source as files: form, options, splits that share nothing; offline, and with the real data."""

from __future__ import annotations

import collections
import itertools
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from peftree.assets import data, sources
from peftree.assets.data import SOURCES, grouped, write_data
from peftree.assets.sources import Definition, Emoji, Scored, Translation, Turn, plain
from peftree.data.rows import load_data
from peftree.errors import DataError

SIZES = {"train": 20, "valid": 6, "test": 10}
PAIRED = {"emoji-pairs": "captioning"}
WORDS = [f"{a}{b}" for a in "abcdef" for b in "uvwxyz"]


@pytest.fixture
def invented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Invented rows behind every source; returns a folder for files."""
    scored = [Scored(f"review, number {i // 2 if i < 8 else i}", (i % 9 - 4) * 0.9) for i in range(90)]
    nouns = [Definition(f"w{i}", f"what {i // 2 if i < 6 else i} is", f"noun.x{i % 3}") for i in range(60)]
    turns = [Turn(f"question {i // 3}", f"answer {i}") for i in range(30)]
    turns += [Turn(f"other {i}", f"Answer  {i}") for i in range(15)]
    turns += [Turn(f"single {i}", f"alone {i}") for i in range(12)]
    people = [f"{who} {job}" for job in ("farmer", "cook", "pilot") for who in ("man", "woman")]
    names = [(n, "People", "person") for n in people] + [(f"thing {i}", "Objects", "tool") for i in range(40)]
    rows = [Emoji(name, *rest, tmp_path / f"{i:05x}.png") for i, (name, *rest) in enumerate(names)]
    for i, row in enumerate(rows):
        image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
        image.putpixel((1, 1), (i, 0, 0, 255))
        image.save(row.path)
    monkeypatch.setenv("PEFTREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "ensure", lambda name, quiet: None)
    monkeypatch.setattr(data, "vader", lambda domain, quiet: scored)
    monkeypatch.setattr(data, "wordnet_definitions", lambda parts=(), quiet=True: nouns)
    monkeypatch.setattr(data, "labelled_examples", lambda quiet: [(d.definition, d.lexname) for d in nouns])
    monkeypatch.setattr(data, "chatterbot", lambda quiet: turns)
    monkeypatch.setattr(data, "emoji", lambda quiet: rows)
    texts = [Translation(f"Open the file {w}, step {i}", f"Abrir {w} {i}") for i in range(2) for w in WORDS]
    monkeypatch.setattr(data, "interface", lambda language, quiet: texts)
    return tmp_path


def check(folder: Path, source: str, options: dict[str, Any], sizes: dict[str, int]) -> Any:
    """Write a source, read it as a user does, and check sizes and that no source is in two splits."""
    written = write_data(folder, source, options, sizes, quiet=True)
    rows = load_data(written, task=PAIRED.get(source))
    assert {s: len(getattr(rows, s)) for s in sizes} == sizes
    assert rows.warnings == ()
    splits = [{plain(r.source) for r in getattr(rows, s)} for s in sizes]
    assert not any(a & b for a, b in itertools.combinations(splits, 2))
    return rows


@pytest.mark.parametrize("source", ["movies", "products", "tweets", "glosses", "examples", "chat", "emoji-pairs"])
def test_source_is_read_as_a_users_files(invented: Path, source: str) -> None:
    rows = check(invented / "out", source, {}, SIZES)
    kinds = {"chat": "generation", "emoji-pairs": "captioning"}
    assert rows.task == kinds.get(source, "text-classification")
    texts = [plain(r.source) for s in SIZES for r in getattr(rows, s)]
    assert source == "chat" or len(set(texts)) == len(texts)


def test_classes_without_a_training_row_are_left_out(invented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"text {i}", "ab"[i % 2]) for i in range(400)] + [("text x", "rare"), ("text y", "rare")]
    monkeypatch.setattr(data, "labelled_examples", lambda quiet: rows)
    found = check(invented / "out", "examples", {}, {"train": 20, "valid": 150, "test": 150})
    assert found.labels == ("a", "b")


def test_ratings_as_numbers(invented: Path) -> None:
    rows = check(invented / "out", "movies", {"task": "text-regression"}, SIZES)
    assert rows.task == "text-regression"
    # Texts that are rated twice, and not alike, tell nothing; the invented ones are numbers 0 to 3.
    assert not {f"review, number {i}" for i in range(4)} & {r.source for r in rows.train + rows.valid + rows.test}
    means = [sum(float(r.target) for r in part) / len(part) for part in (rows.train, rows.test)]
    assert abs(means[0] - means[1]) < 1  # every rating keeps its share
    few = write_data(invented / "few", "movies", {"margin": 2}, SIZES, quiet=True)
    assert load_data(few).labels == ("negative", "positive")


def test_questions_and_answers_stay_in_one_split(invented: Path) -> None:
    rows = check(invented / "out", "chat", {}, SIZES)
    answers = [{plain(r.target) for r in getattr(rows, s)} for s in SIZES]
    assert not any(a & b for a, b in itertools.combinations(answers, 2))


def test_texts_of_an_interface_that_differ_in_figures_alone_stay_in_one_split(invented: Path) -> None:
    rows = check(invented / "out", "interface-es", {}, SIZES)
    words = [{r.source.split()[3] for r in getattr(rows, s)} for s in SIZES]
    assert not any(a & b for a, b in itertools.combinations(words, 2))
    assert rows.train[0].source.startswith("Open the file") and rows.train[0].target.startswith("Abrir")


def catalogue(entries: dict[str, str]) -> bytes:
    """Return a compiled catalogue of gettext."""
    texts = [text.encode() for pair in sorted(entries.items()) for text in pair]
    head, at, tables = 28, 28 + 16 * len(entries), [b"", b""]
    for i, text in enumerate(texts):
        tables[i % 2] += struct.pack("<2I", len(text), at)
        at += len(text) + 1
    start = struct.pack("<7I", 0x950412DE, 0, len(entries), head, head + 8 * len(entries), 0, 0)
    return start + b"".join(tables) + b"".join(text + b"\0" for text in texts)


def test_catalogues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "": "Project-Id-Version: x",
        "menu\x04~Open the next file": "Abrir el archivo siguiente",
        "other\x04Open the next file": "Abra el archivo siguiente ahora",
        "one\0many": "uno\0muchos",
        "Save it": "Guardar",
        "Insert %1 rows before this": "Insertar %1 filas",
        "Name of the program": "Name of the program",
    }
    pairs = sources.parse_mo(catalogue(entries))
    assert ("~Open the next file", "Abrir el archivo siguiente") in pairs and len(pairs) == 5
    for bad in (b"", catalogue(entries)[:40], b"\0" * 40):
        with pytest.raises(DataError, match="catalogue"):
            sources.parse_mo(bad)
    file = tmp_path / "usr/lib/libreoffice/program/resource/es/LC_MESSAGES/a.mo"
    file.parent.mkdir(parents=True)
    file.write_bytes(catalogue(entries))
    monkeypatch.setattr(sources, "ensure", lambda name, quiet: tmp_path)
    assert sources.interface("es") == [("Open the next file", "Abrir el archivo siguiente")]
    with pytest.raises(DataError, match=r"no interface in .pt.\. Known: es, pt-br"):
        sources.interface("pt")


def test_emoji_are_on_white_and_near_duplicates_in_one_split(invented: Path) -> None:
    rows = check(invented / "out", "emoji-pairs", {}, SIZES)
    place = {r.target: s for s in SIZES for r in getattr(rows, s)}
    for job in ("farmer", "cook", "pilot"):
        assert place.get(f"man {job}") == place.get(f"woman {job}")
    with Image.open(rows.train[0].source) as image:
        assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    folders = write_data(invented / "classes", "emoji", {"categories": ["Objects"]}, SIZES, quiet=True)
    assert {p.parent.name for p in folders.glob("*/*/*.png")} == {"objects"}


def test_the_same_arguments_write_the_same_bytes(invented: Path) -> None:
    def files(name: str, seed: int) -> list[tuple[str, bytes]]:
        folder = write_data(invented / name, "emoji-pairs", {}, SIZES, seed, quiet=True)
        found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
        return [(p.relative_to(folder).as_posix(), p.read_bytes()) for p in found]

    assert files("one", 0) == files("two", 0) != files("three", 1)


def test_what_is_asked_for_wrongly(invented: Path) -> None:
    for source, options, sizes, message in (
        ("movie", {}, SIZES, "no data source 'movie'.*Did you mean 'movies'"),
        ("movies", {"tsk": "x"}, SIZES, "no option 'tsk'.*Did you mean 'task'"),
        ("movies", {"task": "generation"}, SIZES, "not one of its tasks"),
        ("movies", {"margin": "0.5"}, SIZES, "margin: '0.5' is not a float"),
        ("movies", {"margin": True}, SIZES, "margin: True is not a float"),
        ("glosses", {"classes": []}, SIZES, "no option 'classes'"),
        ("emoji-pairs", {"categories": "Objects"}, SIZES, "'Objects' is not a list"),
        ("emoji-pairs", {"categories": ["Object"]}, SIZES, "no category 'Object'.*Did you mean 'Objects'"),
        ("fashion-mnist", {"classes": ["bags"]}, SIZES, "no class 'bags'.*Did you mean 'bag'"),
        ("chat", {}, {"train": 500}, "500 rows asked for"),
        ("chat", {}, {"dev": 5}, "is not a split"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            write_data(invented / "bad", source, options, sizes, quiet=True)
        assert not (invented / "bad").exists()


def test_grouped_keeps_groups_and_shares() -> None:
    rows = [(i, i // 3, "ab"[i % 2]) for i in range(300)]
    sizes = {"train": 201, "valid": 30, "test": 60}
    splits = grouped(rows, lambda r: [r[1]], lambda r: r[2], sizes, random.Random(0))
    assert {s: len(part) for s, part in splits.items()} == sizes
    groups = [{r[1] for r in part} for part in splits.values()]
    assert not any(a & b for a, b in itertools.combinations(groups, 2))
    shares = collections.Counter(r[2] for r in splits["test"])
    assert abs(shares["a"] - shares["b"]) <= 4
    chain = [(i,) for i in range(10)]
    with pytest.raises(DataError, match="train: 5 rows asked for, only 0 exist"):  # each has a key of its neighbour
        grouped(chain, lambda r: [r[0], r[0] + 1], lambda _: 0, {"train": 5}, random.Random(0))


def test_concepts() -> None:
    def same(one: tuple[str, str, str], two: tuple[str, str, str]) -> bool:
        rows = [Emoji(caption, "x", sub, Path(f"{code}.png")) for caption, sub, code in (one, two)]
        return bool(set(sources.concept(rows[0])) & set(sources.concept(rows[1])))

    assert same(("man farmer", "", "1f468-200d-1f33e"), ("woman farmer", "", "1f469-200d-1f33e"))
    assert same(("swimmer", "", "1f3ca"), ("woman swimming", "", "1f3ca-200d-2640-fe0f"))  # by their code points
    assert same(("older man", "", "1f474"), ("older woman", "", "1f475"))  # by their names
    assert same(("family: man, boy", "family", "1"), ("family: woman, girl", "family", "2"))
    assert same(("man walking", "", "1"), ("man walking facing right", "", "2"))
    assert not same(("man farmer", "", "1f468-200d-1f33e"), ("man cook", "", "1f468-200d-1f373"))
    assert not same(("poland flag", "", "1f1f5-1f1f1"), ("chad flag", "", "1f1f9-1f1e9"))
    assert not same(("human", "", "1"), ("permanent", "", "2"))  # "man" inside a word is not a man


@pytest.mark.slow
@pytest.mark.enable_socket  # fetches what the cache lacks
def test_real_sources(tmp_path: Path) -> None:
    sizes = {"train": 300, "valid": 60, "test": 100}
    for source in SOURCES:
        if source != "fashion-mnist":
            check(tmp_path / source, source, {}, sizes)
    for domain in ("movies", "products", "tweets"):
        check(tmp_path / f"{domain}-rated", domain, {"task": "text-regression"}, sizes)
    bags = write_data(tmp_path / "bags", "fashion-mnist", {"classes": ["bag", "coat"]}, sizes, quiet=True)
    assert load_data(bags).labels == ("bag", "coat")
    assert len(check(tmp_path / "glosses", "glosses", {}, {**sizes, "train": 2_000}).labels) == 26
    most = check(tmp_path / "most", "emoji-pairs", {}, {"train": 1_400, "valid": 150, "test": 250})
    seen = {r.target for r in most.train}
    swapped = {r.target.replace("woman ", "man ") for r in most.test if r.target.startswith("woman ")}
    assert swapped and not swapped & seen
    lines = (tmp_path / "most" / "test" / "metadata.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)) == {"file_name", "text"} for line in lines)
