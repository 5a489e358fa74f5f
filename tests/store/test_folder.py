"""A save that fails at any step leaves what was there, and no file of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from peftree import store
from peftree.adapter import Adapter
from peftree.errors import BusyError, StoreError
from peftree.store import folder as folders
from peftree.store import native
from peftree.store.folder import CONFIG, MANIFEST, NATIVE, PEFT
from sampled import quick
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
    with pytest.raises(BusyError, match=r"/a could not be written: No space left.*free space.*unchanged"):
        store.save(two[1], tmp_path / "a")
    assert contents(tmp_path) == before


def in_a_fork(work: Callable[[], object]) -> int:
    """Do `work` in a process of its own and return its exit code: negative for a signal, 3 for another error."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BusyError:
            os._exit(BusyError.exit_code)
        except BaseException:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and forks as on Linux")
def test_a_file_that_the_system_cuts_off_is_our_error(two: tuple[Adapter, Adapter], tmp_path: Path) -> None:
    store.save(two[0], tmp_path / "a")
    before = contents(tmp_path)

    def limited() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        store.save(two[1], tmp_path / "a")

    assert in_a_fork(limited) == 75
    assert contents(tmp_path) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.parametrize("form", quick(["native", "peft"]))
@pytest.mark.parametrize("others", quick([True, False]))
def test_a_save_killed_anywhere_leaves_the_old_or_the_new_adapter(
    form: Any, others: bool, two: tuple[Adapter, Adapter], tmp_path: Path
) -> None:
    real = {name: getattr(os, name) for name in ("replace", "link", "unlink", "rename", "rmdir", "mkdir", "fsync")}
    seen, number, code = [], 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        place = tmp_path / str(number)
        store.save(two[0], place, format="native")
        if others:
            (place / "notes.txt").write_text("mine")

        def work(last: int = number, place: Path = place) -> None:
            left = [last]

            def counted(name: str) -> Any:
                def call(*args: Any, **more: Any) -> Any:
                    if not left[0]:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return real[name](*args, **more)

                return call

            for name in real:
                setattr(os, name, counted(name))
            store.save(two[1], place, format=form)

        code = in_a_fork(work)
        seen.append(which(two, place))
        store.save(two[1], place, format=form)  # the next save works and clears what was left
        assert which(two, place) == 1
        assert others == (place / "notes.txt").exists()
        assert {p.name for p in place.iterdir()} <= {NATIVE, PEFT, CONFIG, MANIFEST, "notes.txt"}
        number += 1
    assert code == 0 and number > 6
    assert seen == sorted(seen) and set(seen) == {0, 1}


def which(two: tuple[Adapter, Adapter], place: Path) -> int:
    """Return which of the two adapters a folder holds, whole."""
    state = store.load(zoo.build("llama"), place).state()
    same = [all(torch.equal(state[k], t) for k, t in adapter.state().items()) for adapter in two]
    assert sorted(same) == [False, True]
    return same.index(True)


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


def test_a_load_that_races_a_save_gives_one_of_the_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process saves between the reading of the manifest and that of the weights: the folder is read again."""
    _, adapter = tools.adapted("llama", "lora")
    folder = store.save(adapter, tmp_path / "a", format="native")
    real, times = native.read_weights, []

    def racing(*args: Any) -> Any:
        times.append(1)
        if len(times) == 1:
            tools.shake(adapter.parameters(), seed=9)
            store.save(adapter, folder, format="native")
        return real(*args)

    monkeypatch.setattr(native, "read_weights", racing)
    back = store.load(zoo.build("llama"), folder)
    assert len(times) == 2
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), back.parameters(), strict=True))
    (folder / NATIVE).write_bytes(b"x")
    with pytest.raises(StoreError, match="SHA-256 differs"):
        store.load(zoo.build("llama"), folder)
    assert len(times) == 3, "a damaged folder that nobody writes is read once"
