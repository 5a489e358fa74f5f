"""A save that fails at any step leaves what was there, and no file of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from peftree import store
from peftree.adapter import Adapter
from peftree.errors import StoreError
from peftree.store import folder as folders
from peftree.store.folder import CONFIG, MANIFEST, NATIVE, PEFT
from store import tools


class TornError(Exception):
    """Stands for a crash."""


def steps(monkeypatch: Any, where: set[str]) -> Iterator[list[str]]:
    """Yield again and again, and let call number 0, 1, 2 ... of these functions of `os` fail; stop when none did.

    What is yielded lists the calls of this round.
    """
    at = 0
    while True:
        calls: list[str] = []
        with monkeypatch.context() as patch:
            for name in where:
                patch.setattr(os, name, _failing(name, getattr(os, name), calls, at))
            yield calls
        if len(calls) <= at:
            return
        at += 1


def _failing(name: str, real: Callable[..., Any], calls: list[str], at: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == at + 1:
            raise TornError(name)
        return real(*args, **kwargs)

    return run


def contents(path: Path) -> dict[str, bytes]:
    """Return every file below `path` with its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def two() -> tuple[Adapter, Adapter]:
    """Two adapters that differ."""
    return tools.adapted("llama", "lora")[1], tools.adapted("llama", "lora", r=4)[1]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("form", ["native", "peft"])
def test_the_old_adapter_survives_a_crash_at_every_step(
    exchange: bool, others: bool, form: Any, two: tuple[Adapter, Adapter], tmp_path: Path, monkeypatch: Any
) -> None:
    old, new = two
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    home = tmp_path / "home" / "a"
    store.save(old, home, format="native")
    if others:
        (home / "checkpoint-1").mkdir()
        (home / "checkpoint-1" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    failed = 0
    for calls in steps(monkeypatch, {"fsync", "replace", "link", "chmod"}):
        assert contents(tmp_path) == before
        try:
            store.save(new, home, format=form)
        except TornError:
            failed += 1
            if contents(tmp_path) != before:  # the last steps come after the new one is in place
                assert calls[-1] == "fsync"
                _is(new, home)
                store.save(old, home, format="native")
                before = contents(tmp_path)
    assert failed >= 5
    _is(new, home)
    assert tools.tree(home) == ({NATIVE} if form == "native" else {PEFT, CONFIG}) | {MANIFEST} | (
        {"checkpoint-1", "checkpoint-1/notes.txt"} if others else set()
    )
    assert tools.tree(tmp_path / "home") == {"a", *(f"a/{n}" for n in tools.tree(home))}


def _is(adapter: Adapter, folder: Path) -> None:
    again = store.load(zoo.build("llama"), folder)
    assert all(torch.equal(v, again.state()[k]) for k, v in adapter.state().items())


def test_a_first_save_that_fails_leaves_nothing(two: tuple[Adapter, Adapter], tmp_path: Path, monkeypatch: Any) -> None:
    for calls in steps(monkeypatch, {"fsync", "replace", "chmod"}):
        try:
            store.save(two[0], tmp_path / "a")
        except TornError:
            if tools.tree(tmp_path):  # only the folder's own sync may fail once it is in place
                assert calls[-1] == "fsync"
                _is(two[0], tmp_path / "a")
                for name in sorted(tools.tree(tmp_path), reverse=True):
                    path = tmp_path / name
                    path.rmdir() if path.is_dir() else path.unlink()
    _is(two[0], tmp_path / "a")


def test_a_full_disk_leaves_the_old_adapter(two: tuple[Adapter, Adapter], tmp_path: Path, monkeypatch: Any) -> None:
    store.save(two[0], tmp_path / "a")
    before = contents(tmp_path)

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        store.save(two[1], tmp_path / "a")
    assert contents(tmp_path) == before


def test_links_are_not_followed(two: tuple[Adapter, Adapter], tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(away)
    with pytest.raises(StoreError, match="link or a file"):
        store.save(two[0], tmp_path / "link")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="link or a file"):
        store.save(two[0], tmp_path / "file")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "other").touch()
    (inner / NATIVE).symlink_to(away / "precious")
    with pytest.raises(StoreError, match="is a link"):
        store.save(two[0], inner, format="native")
    assert (away / "precious").read_text() == "mine"
    assert tools.tree(away) == {"precious"}
    assert tools.tree(inner) == {"other", NATIVE}


def test_the_working_folder_keeps_its_identity(two: tuple[Adapter, Adapter], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    store.save(two[0], ".", format="native")
    store.save(two[1], ".", format="native")
    assert set(os.listdir()) == {NATIVE, MANIFEST}
    _is(two[1], Path())


def test_folders_can_be_read_by_others(two: tuple[Adapter, Adapter], tmp_path: Path) -> None:
    folder = store.save(two[0], tmp_path / "deep" / "a")
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o644}
    folder.chmod(0o700)
    store.save(two[1], folder)
    assert folder.stat().st_mode & 0o777 == 0o700
