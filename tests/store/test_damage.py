"""Bad folders: every kind of damage is one error of ours, and the model stays as it was."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack

import zoo
from peftree import adapter as adapters
from peftree import store
from peftree.errors import PeftreeError, StoreError
from peftree.store import folder as folders
from peftree.store.folder import CONFIG, MANIFEST, NATIVE, PEFT
from store import tools
from store.tools import refused

Damage = Callable[[Path], None]


def header_of(raw: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file."""
    found: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return found


def with_header(raw: bytes, header: dict[str, Any] | bytes) -> bytes:
    """Return the file with another header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + int.from_bytes(raw[:8], "little") :]


def change_first(raw: bytes, **keys: Any) -> bytes:
    """Return the file with keys of its first tensor's entry changed."""
    header = header_of(raw)
    first = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    header[first] |= keys
    return with_header(raw, header)


HEADERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "0 bytes and no header"),
    "3 bytes": (lambda raw: raw[:3], "3 bytes and no header"),
    "7 bytes": (lambda raw: raw[:7], "7 bytes and no header"),
    "length only": (lambda raw: raw[:8], "states a header of"),
    "half a header": (lambda raw: raw[:100], "states a header of"),
    "header without data": (lambda raw: raw[: 8 + int.from_bytes(raw[:8], "little")], "tensors end at|gap"),
    "one byte short": (lambda raw: raw[:-1], "tensors end at"),
    "one byte more": (lambda raw: raw + b"x", "tensors end at"),
    "huge length": (lambda raw: b"\xff" * 8 + raw[8:], "states a header of"),
    "no JSON": (lambda raw: with_header(raw, b"[" * 40), "bad header"),
    "deep JSON": (lambda raw: with_header(raw, b"[" * 200_000), "bad header"),
    "no UTF-8": (lambda raw: with_header(raw, b"\xff\xfe"), "bad header"),
    "a list": (lambda raw: with_header(raw, b"[]"), "not an object"),
    "a NaN": (lambda raw: with_header(raw, b'{"a": NaN}'), "NaN is not JSON"),
    "an endless number": (lambda raw: with_header(raw, b'{"a": ' + b"9" * 9000 + b"}"), "bad header"),
    "unknown dtype": (lambda raw: change_first(raw, dtype="F7"), "unknown dtype 'F7'"),
    "dtype no text": (lambda raw: change_first(raw, dtype=["F32"]), "unknown dtype"),
    "negative shape": (lambda raw: change_first(raw, shape=[-4, 32]), "an invalid shape"),
    "true as a size": (lambda raw: change_first(raw, shape=[True, 32]), "an invalid shape"),
    "overflowing shape": (lambda raw: change_first(raw, shape=[2**52, 2**52]), "needs"),
    "wrong size": (lambda raw: change_first(raw, shape=[8, 31]), "needs"),
    "too many dimensions": (lambda raw: change_first(raw, shape=[1] * 99), "an invalid shape"),
    "offsets reversed": (lambda raw: change_first(raw, data_offsets=[1024, 0]), "needs"),
    "offsets beyond the end": (lambda raw: change_first(raw, data_offsets=[2**40, 2**40 + 1024]), "overlaps|gap"),
    "a gap": (lambda raw: change_first(raw, data_offsets=[4, 1028]), "overlaps|gap"),
    "unknown key": (lambda raw: change_first(raw, code="x"), "other keys"),
    "metadata of numbers": (lambda raw: with_header(raw, header_of(raw) | {"__metadata__": {"a": 1}}), "not text"),
    "escape in a name": (lambda raw: with_header(raw, {"\x1b[31m": header_of(raw).popitem()[1]}), "not printable"),
    "a pickle": (lambda raw: b"\x80\x04\x95" + raw, "states a header of"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA in the native format."""
    return tools.saved(tmp_path / "home" / "a")


@pytest.mark.parametrize("case", HEADERS)
def test_bad_safetensors_files_are_refused_by_their_header(case: str, folder: Path) -> None:
    change, words = HEADERS[case]
    raw = (folder / NATIVE).read_bytes()
    tools.reseal(folder, change(raw), list_tensors=False)
    refused(folder, words)


def test_two_tensors_of_one_name_or_place_are_refused(folder: Path) -> None:
    raw = (folder / NATIVE).read_bytes()
    header = header_of(raw)
    text = json.dumps(header)
    entry = json.dumps(header[next(n for n in header if n != "__metadata__")])
    tools.reseal(folder, with_header(raw, f'{{"a": {entry}, "a": {entry}}}'.encode()), list_tensors=False)
    refused(folder, "duplicate key 'a'")
    tools.reseal(folder, with_header(raw, f'{text[:-1]}, "a": {entry}}}'.encode()), list_tensors=False)
    refused(folder, "overlaps another tensor")


def test_every_bit_counts(folder: Path) -> None:
    draw = random.Random(0)
    raw = (folder / NATIVE).read_bytes()
    for _ in range(40):
        bit = draw.randrange(len(raw) * 8)
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        (folder / NATIVE).write_bytes(broken)
        refused(folder, "SHA-256 differs")


def test_a_changed_manifest_is_refused_or_says_the_same(folder: Path) -> None:
    draw = random.Random(0)
    raw = (folder / MANIFEST).read_bytes()
    wanted = json.loads(raw)
    seen = 0
    for _ in range(60):
        bit = draw.randrange(len(raw) * 8)
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        (folder / MANIFEST).write_bytes(broken)
        try:
            unchanged = json.loads(broken) == wanted
        except (ValueError, UnicodeDecodeError):
            unchanged = False
        if not unchanged:
            seen += 1
            refused(folder, "seal|not valid JSON|unprintable|not an object|format")
    assert seen > 40


@pytest.mark.parametrize("cut", [0, 1, 100, -2])
def test_a_cut_manifest_is_refused(cut: int, folder: Path) -> None:
    raw = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(raw[:cut])
    refused(folder, "not valid JSON")


MANIFESTS: dict[str, tuple[bytes, str]] = {
    "a list": (b"[]", "not an object"),
    "deep": (b'{"a":' * 200_000, "nested deeper"),
    "no UTF-8": (b"\xff\xfe{}", "not valid JSON"),
    "too long": (b'{"a": "' + b"x" * (1 << 22) + b'"}', "at most"),
    "twice a key": (b'{"format": 1, "format": 1}', "duplicate key"),
    "a NaN": (b'{"format": NaN}', "NaN is not JSON"),
    "of a later version": (b'{"format": 99}', "Update peftree"),
    "escapes": (b'{"format": 1, "name": "\\u001b[31m"}', "unprintable"),
    "nothing": (b"{}", "seal"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_bad_manifests_are_refused(case: str, folder: Path) -> None:
    raw, words = MANIFESTS[case]
    (folder / MANIFEST).write_bytes(raw)
    refused(folder, words)


def spec(method: Any = "lora", **fields: Any) -> dict[str, Any]:
    """Return a method as a manifest holds it."""
    return {"method": {"method": method, "fields": fields}}


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": (spec("lorra"), "Did you mean 'lora"),
    "method is a number": (spec(3), "no method '3'"),
    "no method at all": ({"method": {}}, "malformed"),
    "fields are a list": ({"method": {"method": "lora", "fields": []}}, "malformed"),
    "unknown field": (spec(rank=3), "no key 'rank'"),
    "r is 0": (spec(r=0), "r=0"),
    "r is negative": (spec(r=-4), "r=-4"),
    "r is not a whole number": (spec(r=4.5), "r=4.5"),
    "r is null": (spec(r=None), "r=None"),
    "r is beyond its range": (spec(r=10**9), "r=1000000000"),
    "r is large": (spec(r=65536), "has the shape"),
    "r is another": (spec(r=4), r"has the shape \[8, 32\]; on this model it is \[4, 32\]"),
    "alpha is infinite": (spec(alpha=1e300 * 1e10), "not valid JSON|malformed|alpha"),
    "alpha is negative": (spec(alpha=-1), "alpha=-1"),
    "alpha is text": (spec(alpha="much"), "alpha='much'"),
    "dropout is 2": (spec(dropout=2.0), "dropout=2.0"),
    "sites match nothing": (spec(sites="attn.x"), "No site matches"),
    "sites are not text": (spec(sites=["attn.q"]), "sites="),
    "sites of a tower it lacks": (spec(sites="vision:attn.q attn.v"), "vision"),
    "layers beyond the end": (spec(layers="7-9"), "layers"),
    "another method": (spec("houlsby"), "does not hold the tensors"),
    "fewer sites": (spec(sites="attn.q"), "4 unexpected"),
    "more sites": (spec(sites="attn.q attn.k attn.v"), "4 missing"),
    "a union of numbers": (spec("union", members=[3]), "malformed"),
    "a union with other fields": (spec("union", evil=1), "malformed"),
    "a sum with too few weights": (spec("fusion", members=[spec()["method"]], weights=[]), "malformed"),
    "a path as name": ({"name": "../x"}, "not an adapter name"),
    "an absolute path as name": ({"name": "/etc/x"}, "not an adapter name"),
    "a dot": ({"name": "a.b"}, "not an adapter name"),
    "300 letters": ({"name": "a" * 300}, "not an adapter name"),
    "no name": ({"name": ""}, "not an adapter name"),
    "a number as name": ({"name": 7}, ": name="),
    "unknown key": ({"evil": 1}, "'evil'"),
    "seed is text": ({"seed": "x"}, ": seed="),
    "seed is huge": ({"seed": 10**30}, ": seed="),
    "hash is not a hash": ({"weights": "x"}, ": weights="),
    "other tensors listed": ({"tensors": {}}, "list different tensors"),
    "layout of the other format": ({"layout": "sideways"}, ": layout="),
    "a head that the model lacks": ({"head": True}, "no task head"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_bad_methods_fields_and_names_are_refused(case: str, folder: Path) -> None:
    changes, words = FIELDS[case]
    if case == "alpha is infinite":
        tools.reseal(folder)
        text = (folder / MANIFEST).read_text().replace('"alpha": 16.0', '"alpha": 1e999')
        (folder / MANIFEST).write_text(text)
        words = "seal"
    else:
        tools.reseal(folder, **changes)
    refused(folder, words)


@pytest.mark.parametrize("name", ["", "a/b", "..", "/x", "a b", "a.b", "\x00", "é", "a" * 65, "-a", "default\n"])
def test_bad_names_asked_for_are_refused(name: str, folder: Path) -> None:
    model = zoo.build("llama")
    before = tools.snapshot(model)
    with pytest.raises(PeftreeError, match="not an adapter name"):
        store.load(model, folder, name=name)
    assert tools.same(before, tools.snapshot(model))


def test_tensors_that_are_missing_extra_or_wrong_are_refused(folder: Path) -> None:
    given = unpack((folder / NATIVE).read_bytes())
    first = next(iter(given))
    rest = {k: v for k, v in given.items() if k != first}
    base = zoo.build("llama").state_dict()["model.norm.weight"].clone()
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        (rest, f"1 missing \\(first: '{first}'"),
        ({}, "8 missing"),
        (given | {"model.norm.weight": base}, r"1 unexpected \(first: 'model.norm.weight'"),
        (rest | {first.upper(): given[first]}, "1 missing.*1 unexpected"),
        (given | {first: given[first].T.contiguous()}, "has the shape"),
        (given | {first: torch.full_like(given[first], float("nan"))}, "NaN or infinite"),
        (given | {first: given[first].index_fill(0, torch.tensor(0), -float("inf"))}, "NaN or infinite"),
        (given | {first: given[first].long()}, "is torch.int64, not torch.float32"),
        (given | {first: given[first] > 0}, "is torch.bool, not torch.float32"),
    ]
    for tensors, words in cases:
        tools.reseal(folder, pack(tensors))
        refused(folder, words)


def test_indices_out_of_range_are_refused(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", method="rocoft")
    given = unpack((folder / NATIVE).read_bytes())
    index = next(k for k, v in given.items() if not v.is_floating_point())
    for value in (10**6, -1):
        tools.reseal(folder, pack(given | {index: torch.full_like(given[index], value)}))
        refused(folder, "index out of range")
    tools.reseal(folder, pack(given | {index: given[index].to(torch.int8)}))
    refused(folder, "is torch.int8, not torch.int")


def test_adapters_of_other_bases_are_refused(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a")
    refused(folder, "made for a LlamaForCausalLM, but this is a BertForSequenceClassification", "bert_cls")
    refused(folder, "made for a LlamaForCausalLM, but this is a MistralForCausalLM", "mistral")
    model = zoo.build("llama")
    model.model.layers[1].mlp.up_proj.weight.data.add_(1e-3)
    before = tools.snapshot(model)
    with pytest.raises(PeftreeError, match=r"the values of model\.layers\.1\.mlp\.up_proj\.weight are not those"):
        store.load(model, folder)
    assert tools.same(before, tools.snapshot(model))
    assert store.load(model, folder, allow_other_base=True).name == "default"


def test_an_adapter_of_another_tower_is_refused(tmp_path: Path) -> None:
    folder = tools.saved(tmp_path / "a", "clip", "lora", sites="text:attn.q")
    tools.reseal(folder, **spec(sites="vision:attn.q"))
    refused(folder, "does not hold the tensors", "clip")


def _fifo(folder: Path) -> None:
    (folder / NATIVE).unlink()
    os.mkfifo(folder / NATIVE)


def _directory(folder: Path) -> None:
    (folder / NATIVE).unlink()
    (folder / NATIVE).mkdir()


def _link(name: str, target: str = "") -> Damage:
    def apply(folder: Path) -> None:
        moved = folder.parent / "elsewhere"
        (folder / name).rename(moved)
        (folder / name).symlink_to(target or moved)

    return apply


def _zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "weights.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x", b"0" * 10_000_000)


def _torch(name: str) -> Damage:
    return lambda folder: torch.save({"a": torch.zeros(2)}, folder / name)


def _only_weights(folder: Path) -> None:
    store.save(store.load(zoo.build("llama"), folder), folder, format="peft")
    (folder / CONFIG).unlink()


PLACES: dict[str, tuple[Damage, str]] = {
    "a pickle beside it": (_torch("adapter_model.bin"), "pickle; those can run code.*Convert"),
    "a checkpoint beside it": (_torch("pytorch_model.pt"), "pickle"),
    "a zip beside it": (_zip, "'weights.zip'"),
    "a linked weights file": (_link(NATIVE), "link or not a regular file"),
    "a link to a device": (_link(NATIVE, "/dev/zero"), "link or not a regular file"),
    "a linked manifest": (_link(MANIFEST), "link or not a regular file"),
    "a pipe": (_fifo, "link or not a regular file"),
    "a folder as file": (_directory, "link or not a regular file"),
    "no weights": (lambda f: (f / NATIVE).unlink(), "No such file"),
    "PEFT's config gone": (_only_weights, "lacks adapter_config.json"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "holds no adapter"),
    "both formats": (lambda f: (f / PEFT).write_bytes(b""), "holds both"),
    "a pickle as weights": (lambda f: torch.save({}, f / NATIVE), "SHA-256 differs"),
}


@pytest.mark.parametrize("form", ["native", "peft"])
def test_links_of_hugging_faces_cache_are_read(form: Any, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    model = zoo.build("llama")
    store.save(store.load(model, folder), folder, format=form)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tools.cache(folder, blobs, "snapshots/0a1b/deep")
    assert all(p.is_symlink() for p in snapshot.iterdir())
    wanted = store.load(zoo.build("llama"), folder).state()
    (tmp_path / "elsewhere").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    for place in (snapshot, Path(), tmp_path / "elsewhere"):
        got = store.load(zoo.build("llama"), place).state()
        assert all(torch.equal(wanted[k], got[k]) for k in wanted)
    for file in blobs.iterdir():
        file.unlink()
    refused(snapshot, "link or not a regular file")


@pytest.mark.parametrize(
    ("blobs", "at"),
    [("blobs", "../models--x--y/snapshots/0a1b"), ("other", "snapshots/0a1b"), ("blobs", "0a1b")],
)
def test_other_links_are_refused(blobs: str, at: str, folder: Path, tmp_path: Path) -> None:
    """They come from another repository, lead to another folder of theirs, or do not come from its snapshots."""
    refused(tools.cache(folder, tmp_path / "models--a--b" / blobs, at), "link or not a regular file")


@pytest.mark.parametrize("case", PLACES)
def test_bad_folders_are_refused(case: str, folder: Path) -> None:
    damage, words = PLACES[case]
    damage(folder)
    refused(folder, words)


def test_folders_of_very_many_files_are_refused(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(folders, "ENTRIES", 20)
    for i in range(20):
        (folder / f"{i}").touch()
    refused(folder, "more than 20 entries")


def test_what_a_trainer_leaves_beside_an_adapter_is_not_opened(folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "tokenizer.json", "README.md"):
        (folder / name).write_bytes(b"never read")
    assert store.load(zoo.build("llama"), folder).name == "default"


def test_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nowhere", "is not a folder")
    refused(tmp_path / "file", "is not a folder")
    refused(tmp_path / "empty", "holds no adapter")


@pytest.mark.parametrize("bad", ["", 3, b"x", None])
def test_what_names_no_folder_is_refused(bad: Any, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    adapter = store.load(zoo.build("llama"), ".")
    calls: list[Callable[[], Any]] = [
        lambda: store.load(zoo.build("llama"), bad),
        lambda: store.save(adapter, bad),
        lambda: store.export(adapter, bad),
        lambda: store.export(adapter, bad, "merged"),
    ]
    if bad == "":
        calls += [lambda: store.replace(adapter, bad), lambda: store.from_peft(zoo.build("llama"), bad)]
    for call in calls:
        with pytest.raises(StoreError, match=r"does not name a folder.* '\.' is the current folder"):
            call()


def test_a_file_too_large_for_the_model_is_not_read(folder: Path) -> None:
    with open(folder / NATIVE, "r+b") as file:
        file.truncate(1 << 33)  # sparse
    refused(folder, "an adapter of this model has at most")


def test_the_bytes_that_are_checked_are_the_bytes_that_are_used(folder: Path, monkeypatch: Any) -> None:
    """The file is exchanged right after it was read: what is loaded is still what was hashed."""
    from peftree.store import native

    wanted = unpack((folder / NATIVE).read_bytes())
    read = native.read_file

    def swapped(path: Path, limit: int) -> bytearray:
        data = read(path, limit)
        path.write_bytes(b"something else")
        return data

    monkeypatch.setattr(native, "read_file", swapped)
    adapter = store.load(zoo.build("llama"), folder)
    assert all(torch.equal(wanted[k], v) for k, v in adapter.state().items())


def test_other_adapters_are_untouched_by_a_refusal(tmp_path: Path) -> None:
    good, bad = tools.saved(tmp_path / "good"), tools.saved(tmp_path / "bad", method="houlsby")
    model = zoo.build("llama")
    store.load(model, good)
    (bad / NATIVE).write_bytes(b"broken")
    before, was = tools.snapshot(model), tools.output("llama", model)
    with pytest.raises(PeftreeError):
        store.load(model, bad, name="other")
    assert tools.same(before, tools.snapshot(model))
    assert torch.equal(was, tools.output("llama", model))
    assert list(adapters.adapters(model)) == ["default"]
