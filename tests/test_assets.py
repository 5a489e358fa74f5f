"""Demo assets, models and data: offline on fabricated archives; with the real ones, marked slow."""

from __future__ import annotations

import collections
import csv
import dataclasses
import gzip
import http.client
import io
import json
import random
import re
import struct
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from peftree.assets import data, fetch, models, sources
from peftree.assets.fetch import Asset
from peftree.errors import AssetError, DataError
from peftree.files import sha256

MEMBERS = {"pkg/a.txt": b"alpha", "pkg/sub/b.txt": b"beta", "other/c.txt": b"gamma"}
UNPACKED = {"pkg/a.txt", "pkg/sub/b.txt"}


def wheel(members: dict[str, bytes]) -> bytes:
    """Return the bytes of a zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def tarball(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return the bytes of a tar archive; `kind` makes its members links or devices."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def debian(members: dict[str, bytes]) -> bytes:
    """Return the bytes of a Debian package: an ar archive, an entry of odd size before the data."""
    raw, out = tarball({f"./{name}": value for name, value in members.items()}), b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", raw)):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        out += header.encode() + content + b"\n" * (len(content) % 2)
    return out


ARCHIVES: dict[fetch.Kind, Callable[[dict[str, bytes]], bytes]]
ARCHIVES = {"wheel": wheel, "sdist": tarball, "deb": debian, "npm": tarball}


def entry(kind: fetch.Kind, content: bytes, members: str = "pkg/*", version: str = "1.0") -> Asset:
    """Return a table entry for an archive of `content`."""
    digest, size = sha256(content), len(content)
    return Asset("toy", kind, "toy-pkg", version, size, digest, "MIT", "toy", (members,), "main/t")


def below(folder: Path) -> set[str]:
    """Return the files of `folder`, locks and manifests left out."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not path.match("*.lock") and path.name[0] != "."}


class Registry:
    """Two ways to fetch the asset "toy": each delivers what `replies` says, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.good, self.calls = wheel(MEMBERS), list[str]()
        self.replies: dict[str, bytes | BaseException] = {"first": self.good, "second": self.good}
        monkeypatch.setattr(fetch, "ASSETS", {"toy": entry("wheel", self.good)})
        ways = [(label, lambda _, folder, label=label: self.reply(label, folder))
                for label in self.replies]  # fmt: skip
        monkeypatch.setattr(fetch, "_WAYS", {"wheel": ways})

    def reply(self, label: str, folder: Path) -> None:
        """Deliver, or leave half a file and fail."""
        self.calls.append(label)
        reply = self.replies[label]
        (folder / "archive").write_bytes(reply if isinstance(reply, bytes) else b"half")
        if isinstance(reply, BaseException):
            raise reply


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("PEFTREE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with a good archive."""
    return Registry(monkeypatch)


def test_table_is_complete_and_needs_no_torch() -> None:
    for name, asset in fetch.ASSETS.items():
        assert asset.name == name and re.fullmatch("[0-9a-f]{64}", asset.sha256)
        assert asset.size > 0 and asset.version and asset.licence and asset.members
        assert (asset.kind == "deb") == bool(asset.pool)
    for name, model in models.MODELS.items():
        packaged = [fetch.ASSETS[asset].sha256 for asset in models.asset_names(model)]
        assert models.describe(name)["sha256"] == " ".join(packaged)
    code = "import sys, peftree.assets.models, peftree.assets.data; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_fetched_once_only_expected_members_with_a_progress_line(
    registry: Registry, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = fetch.ensure("toy")
    assert "fetching toy" in capfd.readouterr().err
    assert fetch.ensure("toy") == folder and registry.calls == ["first"]
    assert below(cache) == {f"assets/toy/{name}" for name in UNPACKED}
    (folder / "pkg/a.txt").unlink()
    fetch.ensure("toy", quiet=True)
    assert (folder / "pkg/a.txt").read_bytes() == b"alpha"
    assert capfd.readouterr() == ("", "")
    with pytest.raises(AssetError, match=r"'tiy'.*Did you mean 'toy'"):
        fetch.ensure("tiy")


def test_wrong_hash_is_refused_and_nothing_is_left(registry: Registry, cache: Path) -> None:
    bad = wheel({**MEMBERS, "pkg/a.txt": b"ALPHA"})
    registry.replies = {"first": bad, "second": urllib.error.URLError("offline")}
    with pytest.raises(AssetError, match=r"toy-pkg 1\.0.*PyPI.*refused.*offline.*downloads") as got:
        fetch.ensure("toy", quiet=True)
    assert sha256(bad) in str(got.value) and registry.calls == ["first", "second"]
    assert below(cache) == set() and list((cache / "assets").iterdir()) == []


@pytest.mark.parametrize(
    "problem",
    [AssetError("no pip."), OSError("cut"), http.client.IncompleteRead(b"1"),
     subprocess.TimeoutExpired("npm", 1), b"wrong bytes"],
)  # fmt: skip
def test_the_next_way_is_tried(registry: Registry, problem: bytes | Exception) -> None:
    registry.replies["first"] = problem
    assert below(fetch.ensure("toy", quiet=True)) == UNPACKED
    assert registry.calls == ["first", "second"]


def test_archive_put_in_downloads_needs_no_network(registry: Registry, cache: Path) -> None:
    (cache / "downloads" / "folder").mkdir(parents=True)
    (cache / "downloads" / "a-wrong-one").write_bytes(bytes(len(registry.good)))
    (cache / "downloads" / "any-name").write_bytes(registry.good)
    assert below(fetch.ensure("toy", quiet=True)) == UNPACKED and registry.calls == []


def test_interrupted_or_killed_leaves_nothing(registry: Registry, cache: Path) -> None:
    registry.replies["first"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        fetch.ensure("toy", quiet=True)
    registry.replies["first"] = registry.good
    assert list((cache / "assets").iterdir()) == []
    killed = cache / "assets" / ".toy.abc.tmp" / ".staging-x"
    killed.mkdir(parents=True)
    (killed / "archive.part").write_bytes(b"half")
    fetch.ensure("toy", quiet=True)
    assert [path.name for path in (cache / "assets").iterdir()] == ["toy"]


def test_damaged_or_outdated_folder_is_made_again(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetch.ensure("toy", quiet=True)
    (folder / "pkg/a.txt").write_bytes(b"al")
    assert (fetch.ensure("toy", quiet=True) / "pkg/a.txt").read_bytes() == b"alpha"
    (folder / fetch.MANIFEST).write_text("[1, 2")
    assert below(fetch.ensure("toy", quiet=True)) == UNPACKED
    newer = wheel({"pkg/new.txt": b"new"})
    monkeypatch.setattr(fetch, "ASSETS", {"toy": entry("wheel", newer)})
    registry.replies["first"] = newer
    assert below(fetch.ensure("toy", quiet=True)) == {"pkg/new.txt"}
    assert registry.calls == ["first"] * 4


def test_folders_that_cannot_be_used(registry: Registry, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = cache / "assets" / "toy" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(AssetError, match="did not write"):
        fetch.ensure("toy", quiet=True)
    assert mine.read_text() == "mine"
    monkeypatch.setenv("PEFTREE_CACHE", str(mine))
    with pytest.raises(AssetError, match="set PEFTREE_CACHE"):
        fetch.ensure("toy", quiet=True)


def test_two_processes_at_once_build_once(cache: Path, tmp_path: Path) -> None:
    code = """
import pathlib, sys, time
from peftree.assets.fetch import make_folder
base = pathlib.Path(sys.argv[1])
def build(folder):
    with (base / "log").open("a") as file:
        file.write("built ")
    (folder / "one").write_text("1")
    time.sleep(0.4)
    (folder / "two").write_text("2")
print(len(list(make_folder(base / "made", "key", build, "making", quiet=True).iterdir())))
"""
    run = [sys.executable, "-c", code, str(tmp_path)]
    pair = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in pair] == ["3", "3"]  # with manifest
    assert (tmp_path / "log").read_text() == "built "


def unpack(kind: fetch.Kind, content: bytes, folder: Path, members: str = "pkg/*") -> set[str]:
    """Unpack `content` into `folder`/a/out and return what lies below `folder`."""
    (folder / "archive").write_bytes(content)
    (folder / "a" / "out").mkdir(parents=True)
    fetch.unpack(folder / "archive", entry(kind, content, members), folder / "a" / "out")
    return below(folder / "a" / "out")


@pytest.mark.parametrize("kind", ARCHIVES)
def test_unpacking_takes_expected_members_only(kind: fetch.Kind, tmp_path: Path) -> None:
    assert unpack(kind, ARCHIVES[kind](MEMBERS), tmp_path) == UNPACKED
    assert (tmp_path / "a/out/pkg/sub/b.txt").read_bytes() == b"beta"
    (tmp_path / "second").mkdir()
    with pytest.raises(AssetError, match=r"no member pkg/\*\.gguf"):
        unpack(kind, ARCHIVES[kind](MEMBERS), tmp_path / "second", "pkg/*.gguf")


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("name", ["pkg/../../../evil", "/pkg/evil", "pkg\\..\\evil"])
def test_member_that_leaves_the_folder_is_refused(kind: fetch.Kind, name: str, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="outside"):
        unpack(kind, ARCHIVES[kind]({name: b"evil"}), tmp_path, "*pkg*")
    assert below(tmp_path) == {"archive"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="not a regular file"):
        unpack("npm", tarball({"pkg/link": b""}, kind), tmp_path)


@pytest.mark.parametrize("kind", ["wheel", "sdist", "deb"])
@pytest.mark.parametrize("content", [b"", b"no archive", b"!<arch>\n", debian(MEMBERS)[:300]])
def test_damaged_archive_is_one_error(kind: fetch.Kind, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="archive cannot be unpacked"):
        unpack(kind, content, tmp_path)


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes, cut: int = 999, ranges: bool = True) -> list[str]:
    """Put a server of `content` under urlopen, `cut` bytes a request; return what gets asked."""
    asked: list[str] = []

    def opened(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        asked.append(request.full_url)
        start = int(request.get_header("Range", "bytes=0-")[6:-1]) if ranges else 0
        reply = io.BytesIO(content[start : start + cut])
        reply.status = 206 if start else 200  # type: ignore[attr-defined]
        return reply

    monkeypatch.setattr("urllib.request.urlopen", opened)
    return asked


@pytest.mark.parametrize(
    ("cut", "ranges", "size", "requests"),
    [(99, True, 10, 1), (4, True, 10, 3), (4, False, 10, 0), (99, True, 12, 0), (99, True, 8, 0)],
)
def test_download_resumes_and_checks_the_size(
    cut: int, ranges: bool, size: int, requests: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = serve(monkeypatch, b"0123456789", cut, ranges)
    if requests:
        fetch._download("https://host/f", tmp_path / "f", size)
        assert (tmp_path / "f").read_bytes() == b"0123456789" and len(asked) == requests
    else:
        with pytest.raises(AssetError, match="bytes"):
            fetch._download("https://host/f", tmp_path / "f", size)
        assert not (tmp_path / "f").exists()


def test_index_is_searched_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = entry("sdist", b"content")
    page = f'<a href="../f/old#sha256={"0" * 64}"><a href="../f/new#sha256={wanted.sha256}">'
    asked = serve(monkeypatch, page.encode())
    monkeypatch.setenv("PIP_INDEX_URL", "https://host/simple/")
    with pytest.raises(AssetError, match="gave"):  # the page is served in place of the file
        fetch._index(wanted, tmp_path)
    assert asked[:2] == ["https://host/simple/toy-pkg/", "https://host/simple/f/new"]
    monkeypatch.setenv("PIP_INDEX_URL", "file:///etc")
    with pytest.raises(AssetError, match="not an HTTP address"):
        fetch._index(wanted, tmp_path)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(*command: str, cwd: Path) -> str:
        ran.append(" ".join(command))
        if ran.count(ran[-1]) == 1 and "apt-get download" in ran[-1]:
            raise AssetError("no such package")
        return ""

    monkeypatch.setattr(fetch, "_run", run)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    (tmp_path / "staging").mkdir()
    fetch._pip(entry("sdist", b"x"), tmp_path / "staging")
    assert "--require-hashes --no-binary :all:" in ran.pop()
    assert f"--hash=sha256:{sha256(b'x')}" in (tmp_path / "requirement.txt").read_text()
    fetch._npm(entry("npm", b"x"), tmp_path)
    assert ran.pop() == "npm pack --ignore-scripts toy-pkg@1.0"
    fetch._apt(entry("deb", b"x"), tmp_path)
    assert ran == ["apt-get download toy-pkg=1.0", "apt-get update", "apt-get download toy-pkg=1.0"]
    ran.clear()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(AssetError, match="no such package"):
        fetch._apt(entry("deb", b"x"), tmp_path)


def test_parsers() -> None:
    lines = "1\t2.5\tGood &amp; kind\r\n2\t-1\t bad \n\n3\t0.2\tmeh\n4\t1\tBAD\n"
    rows = sources.parse_vader(lines)
    assert rows[0] == ("Good & kind", 2.5) and len(rows) == 4
    assert sources.binary([*rows, sources.Scored("good  &  Kind", 3)]) == [("Good & kind", "positive")]
    line = '0001 05 a 02 tame(p) 0 pet_dog 0 000 | a kept animal; in a house; "a dog"; "my cat"  '
    assert sources.parse_synset(line) == (
        ("tame", "a kept animal; in a house", "noun.animal"), ["a dog", "my cat"])  # fmt: skip
    idx = b"\0\0\x08\x02" + struct.pack(">2I", 2, 3) + bytes(range(6))
    assert sources.parse_idx(gzip.compress(idx)).tolist() == [[0, 1, 2], [3, 4, 5]]
    for bad in (idx[:-1], b"\1" + idx[1:]):
        with pytest.raises(DataError):
            sources.parse_idx(gzip.compress(bad))
    kept = [sources.Definition(w, d, "x") for w, d in (("cat", "a b c"), ("cat", "d e f"),
            ("dog", "a b c"), ("Rome", "g h i"), ("a cat", "j k l"), ("ox", "m n"))]  # fmt: skip
    assert data.plain_definitions(kept) == kept[:1]


SIZES = {"train": 20, "valid": 10, "test": 10}


def check_demo_data(base: Path, sizes: dict[str, int]) -> None:
    """Write every task's data and check form, sizes, shares, disjointness and determinism."""
    total = sum(sizes.values())

    def write(task: str, seed: int = 0, name: str = "") -> Path:
        return data.write_data(base / (name or task), task, {}, sizes, seed, quiet=True)

    texts = {s: (write("movies") / f"{s}.csv").read_text("utf-8") for s in sizes}
    tables = {s: list(csv.DictReader(io.StringIO(text))) for s, text in texts.items()}
    assert {s: len(rows) for s, rows in tables.items()} == sizes
    assert len({row["text"].lower() for rows in tables.values() for row in rows}) == total
    shares = [sum(row["label"] == "negative" for row in rows) / len(rows) for rows in tables.values()]
    assert max(shares) - min(shares) <= 2 / min(sizes.values())
    texts = {s: (write("definitions") / f"{s}.jsonl").read_text("utf-8") for s in sizes}
    pairs = [json.loads(line) for text in texts.values() for line in text.splitlines()]
    assert all(re.fullmatch(r"Define the word: [a-z]+\.", pair["prompt"]) for pair in pairs)
    assert len({p["prompt"] for p in pairs}) == len({p["completion"] for p in pairs}) == total
    folder = write("fashion-mnist")
    for split, size in sizes.items():
        found = collections.Counter(path.parent.name for path in folder.glob(f"{split}/*/*.png"))
        assert dict(found) == dict.fromkeys(sources.FASHION_CLASSES, size // 10)
    assert len({path.name for path in folder.glob("[tv]*i*/*/*")}) == sizes["train"] + sizes["valid"]
    for task in ("movies", "definitions", "fashion-mnist"):
        folders = write(task), write(task, 0, f"{task}-again"), write(task, 1, f"{task}-other")
        first, again, other = ([(f, (d / f).read_bytes()) for f in sorted(below(d))] for d in folders)
        assert first == again != other


def test_demo_data(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = [sources.Scored(f"review, number {i}", (i % 4 == 0) * 4 - 2) for i in range(80)]
    words = [a + b for a in "abcdefghij" for b in "abcdefgh"]
    defined = [sources.Definition(word, f"what a {word} is", f"x{len(word) % 2}") for word in words]
    images = (np.arange(60 * 784).reshape(60, 28, 28) % 251).astype(np.uint8)
    pictures = images, np.arange(60, dtype=np.uint8) % 10, sources.FASHION_CLASSES
    monkeypatch.setattr(data, "ensure", lambda name, quiet: None)
    monkeypatch.setattr(data, "vader", lambda domain, quiet: scored)
    monkeypatch.setattr(data, "wordnet_definitions", lambda quiet: defined)
    monkeypatch.setattr(data, "fashion_mnist", lambda split, quiet: pictures)
    check_demo_data(tmp_path, SIZES)
    for task, sizes, message in (
        ("movie", SIZES, "mean 'movies'"), ("definitions", {"dev": 1}, "dev"),
        ("definitions", {"train": 0}, "train"), ("definitions", {"train": 999}, "only 80 exist"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            data.write_data(tmp_path / "bad", task, {}, sizes, quiet=True)
        assert not (tmp_path / "bad").exists()


def test_model_that_cannot_be_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssetError, match="Did you mean 'minilm-l6'"):
        models.model_folder("minilm")
    needy = dataclasses.replace(models.MODELS["dinov2-small"], needs=("no_such_package",))
    monkeypatch.setitem(models.MODELS, "dinov2-small", needy)
    with pytest.raises(AssetError, match="pip install no_such_package"):
        models.model_folder("dinov2-small")


@pytest.mark.slow
@pytest.mark.enable_socket  # fetches what the cache lacks
def test_real_data(tmp_path: Path) -> None:
    counts = {name: len(sources.vader(name, quiet=True)) for name in sources.VADER_DOMAINS}
    assert counts == {"movies": 10_605, "products": 3_708, "tweets": 4_200, "editorials": 5_190}
    assert len(sources.chatterbot(quiet=True)) == len(set(sources.chatterbot(quiet=True))) == 1_176
    assert len(sources.wordnet_definitions(("noun",), quiet=True)) == 82_115
    assert len(sources.wordnet_examples(quiet=True)) == 23_637
    assert len(sources.emoji(quiet=True)) == 1_906
    assert [len(sources.interface(language, quiet=True)) for language in sources.INTERFACES] == [6_855, 6_930]
    for split, size in (("train", 60_000), ("test", 10_000)):
        images, labels, _ = sources.fashion_mnist(split, quiet=True)
        assert images.shape == (size, 28, 28) and set(np.bincount(labels)) == {size // 10}
    check_demo_data(tmp_path, {"train": 300, "valid": 50, "test": 100})


JOINTS = {"text_projection", "visual_projection", "multi_modal_projector"}


@pytest.mark.slow
@pytest.mark.enable_socket  # fetches what the cache lacks
@pytest.mark.parametrize("name", models.MODELS)
def test_real_model(name: str) -> None:
    import torch
    import transformers

    from peftree.tasks import diffusion

    folder = models.model_folder(name, quiet=True)
    own = {"dit-fashion": diffusion}
    kind = getattr(own.get(name, transformers), str(models.describe(name)["architecture"]))
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    new = set(getattr(model.config, "fresh_modules", ()))
    assert all(new & set(key.split(".")) for keys in report.values() for key in keys) and model.dtype == torch.float32
    assert new == {part for key in report["missing_keys"] for part in key.split(".")} & JOINTS
    assert sum(p.numel() for p in model.parameters()) == models.describe(name)["parameters"]
    if name in own:  # see the tests of their modules
        return
    if name.startswith("dinov2"):
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        pixels = processor(np.zeros((28, 28, 3), np.uint8), return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, 224, 224) and model(pixels)[0].isfinite().all()
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if new:
        assert "<image>" in tokenizer.get_vocab() or "llava" not in name
        assert "peftree" not in (folder / "config.json").read_text()  # the cache's place
        return
    if name == "minilm-l6":
        texts = ["A man plays a guitar.", "Someone performs music.", "Stocks fell on Monday."]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        near, far = torch.cosine_similarity(mean[:1], mean[1:])
        assert near > far + 0.2
    else:
        sentence = "The girl went to the park with her mother, and they fed the ducks by the lake."
        words = sentence.split()
        random.Random(0).shuffle(words)
        batches = [tokenizer(text, return_tensors="pt") for text in (sentence, " ".join(words))]
        plain, mixed = (model(**batch, labels=batch["input_ids"]).loss.item() for batch in batches)
        assert tokenizer.chat_template and plain < 4 and mixed > plain + 2
