"""`peftree convert`: pickled PEFT adapters to safetensors, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import zoo
from peftree import cli, store
from peftree.errors import StoreError
from peftree.store.folder import CONFIG, PEFT
from peftree.store.hfpeft.convert import PICKLE, convert, converted
from store import tools


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that PEFT wrote as a pickle, with its output kept beside it."""
    folder = tmp_path_factory.mktemp("bin")
    with tools.Quiet():
        model = peft.get_peft_model(zoo.build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
        tools.shake([p for p in model.parameters() if p.requires_grad])
        model.eval().save_pretrained(folder / "a", safe_serialization=False)
        torch.save(tools.output("llama", model), folder / "wanted")
    return folder


def test_a_pickled_adapter_is_converted_and_loads(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"never read.*\n?.*peftree convert"):
        store.load(zoo.build("llama"), pickled / "a")
    found = CliRunner().invoke(cli.app, ["convert", str(pickled / "a"), str(tmp_path / "b")])
    assert found.exit_code == 0, found.output
    snapshot = tools.cache(pickled / "a", tmp_path / "hub" / "blobs", "snapshots/0a1b")
    assert (convert(snapshot, tmp_path / "c") / PEFT).read_bytes() == (tmp_path / "b" / PEFT).read_bytes()
    shutil.rmtree(tmp_path / "hub")
    shutil.rmtree(tmp_path / "c")
    model = zoo.build("llama")
    store.load(model, tmp_path / "b")
    wanted = torch.load(pickled / "wanted", weights_only=True)
    assert (tools.output("llama", model) - wanted).abs().max() < 1e-5
    assert tools.tree(tmp_path) == {"b", f"b/{PEFT}", f"b/{CONFIG}"}


@pytest.mark.slow
def test_shared_memory_is_copied_and_views_are_cut(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    folder = write(tmp_path / "a", {"x": whole, "y": whole, "z": whole.t()[1:], "p": torch.nn.Parameter(whole[0])})
    tensors = load_file(convert(folder / PICKLE, tmp_path / "b") / PEFT)
    assert all(torch.equal(tensors[k], whole) for k in "xy")
    assert torch.equal(tensors["z"], whole.t()[1:])
    assert torch.equal(tensors["p"], whole[0])


def write(folder: Path, content: Any) -> Path:
    """Make a folder with this content pickled by torch."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    torch.save(content, folder / PICKLE)
    return folder


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def _bomb(path: Path) -> None:
    """Deflate a large record, so that the file is small and what it asks for is not."""
    torch.save({"w": torch.zeros(700 << 20, dtype=torch.float32)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("small"), "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with old.open(name) as source, new.open(name, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)
    path.with_name("small").replace(path)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (lambda p: torch.save({"w": Evil()}, p), "Weights only load failed"),
    "a list": (lambda p: torch.save([torch.ones(2)], p), "holds a list"),
    "a nested dict": (lambda p: torch.save({"state": {"w": torch.ones(2)}}, p), "'state' is a dict"),
    "a number": (lambda p: torch.save({"w": torch.ones(2), "step": 3}, p), "'step' is a int"),
    "a sparse tensor": (lambda p: torch.save({"w": torch.ones(2, 2).to_sparse()}, p), "not a dense tensor"),
    "values that are not finite": (lambda p: torch.save({"w": torch.tensor([float("nan")])}, p), "finite"),
    "nothing": (lambda p: torch.save({}, p), "holds a dict"),
    "a text": (lambda p: p.write_text("hello") and None, "KeyError: 101"),
    "half a file": (
        lambda p: (torch.save({"w": torch.ones(999)}, p), p.write_bytes(p.read_bytes()[:900]))[0],
        "archive|zip|failed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_but_plain_tensors_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = REFUSED[case]
    make(tmp_path / PICKLE)
    with pytest.raises((ValueError, StoreError), match=words):
        converted(str(tmp_path / PICKLE))
    assert tools.tree(tmp_path) == {PICKLE}, "nothing ran"


@pytest.mark.slow
def test_a_refusal_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "a", {"w": Evil()})
    before = tools.tree(tmp_path)
    with pytest.raises(StoreError, match="does not hold plain tensors") as caught:
        convert(folder, tmp_path / "b")
    assert tools.tree(tmp_path) == before
    assert len(str(caught.value)) < 1000


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {})
    _bomb(folder / PICKLE)
    assert (folder / PICKLE).stat().st_size < 10 << 20
    with pytest.raises(StoreError, match=r"memory|alloc"):
        convert(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_source_is_not_written_over(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the source's folder"):
        convert(pickled / "a", pickled / "a")
    with pytest.raises(StoreError, match="is not a file"):
        convert(tmp_path, tmp_path / "b")
