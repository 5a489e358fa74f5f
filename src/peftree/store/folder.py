"""Folders of adapters: listed with limits, read without following foreign links, replaced completely or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from peftree.errors import StoreError, unwritten
from peftree.files import stage_for, sync_folder

NATIVE, PEFT = "adapter.safetensors", "adapter_model.safetensors"
CONFIG, MANIFEST = "adapter_config.json", "manifest.json"
OURS = (NATIVE, PEFT, CONFIG, MANIFEST)
NEXT = ".next"  # a complete newer set of files, where a process was killed before it had put them in place
ENTRIES = 4096
OPEN = 0o755  # a server under another user must be able to read an adapter
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".zip")
# What transformers' Trainer writes beside an adapter in a checkpoint. Never opened here.
_COMPANIONS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state")
_NOFOLLOW: int = os.__dict__.get("O_NOFOLLOW", 0)
_NONBLOCK: int = os.__dict__.get("O_NONBLOCK", 0)


def named(folder: object) -> Path:
    """Return the path of a folder that a user named; StoreError if it is no path, or empty."""
    if not isinstance(folder, str | os.PathLike) or not folder:
        raise StoreError(f"{folder!r} does not name a folder.", "Pass its path; '.' is the current folder.")
    return Path(folder)


def listing(folder: str | Path) -> set[str]:
    """Return which of peftree's four file names are in `folder`.

    Raises:
        StoreError: there is no such folder, it has too many entries, a file to read is a link (but see `cached`) or not
            a regular file, or it holds a pickle.
    """
    path = Path(folder)
    if not path.is_dir():
        raise StoreError(f"{path} is not a folder.", "Name the folder that peftree.save(adapter, folder) wrote.")
    found: set[str] = set()
    with os.scandir(path) as entries:
        for count, entry in enumerate(entries):
            if count >= ENTRIES:
                raise StoreError(f"{path} has more than {ENTRIES:,} entries.", "Give the adapter a folder of its own.")
            if entry.name in OURS:
                if not entry.is_file(follow_symlinks=False) and not cached(entry.path):
                    raise StoreError(f"{entry.path} is a link or not a regular file.", "Copy the file itself there.")
                found.add(entry.name)
            elif entry.name.lower().endswith(_PICKLES) and not entry.name.startswith(_COMPANIONS):
                raise StoreError(
                    f"{path} holds {entry.name!r}, which may be a pickle; those can run code and are never read.",
                    f"Convert it to safetensors: `peftree convert {str(path)[:200]} NEW_FOLDER`."
                    if entry.name == "adapter_model.bin"
                    else "If you trust it, convert it to safetensors elsewhere; remove it from the folder.",
                )
    return found


def cached(path: str | Path) -> Path | None:
    """Return the file in `blobs` to which a link in `snapshots` of Hugging Face's cache leads, None for other paths."""
    blob = Path(os.path.realpath(path))
    inside = blob.parent.name == "blobs" and blob.parents[1] / "snapshots" in Path(path).parent.resolve().parents
    return blob if inside and blob.is_file() else None


def newest(folder: str | Path) -> Path:
    """Return where to read the files of `folder`: `NEXT` in it if a save was killed at its very end."""
    inner = Path(folder) / NEXT
    return inner if inner.is_dir() and not inner.is_symlink() else Path(folder)


def stamp(folder: str | Path) -> list[tuple[int, int, int] | None]:
    """Return what changes when a process saves to `folder`: nodes, sizes and times of it and of peftree's files."""
    paths = [Path(folder), *(Path(folder) / name for name in (NEXT, *sorted(OURS)))]
    found = [os.lstat(path) if os.path.lexists(path) else None for path in paths]
    return [None if f is None else (f.st_ino, f.st_size, f.st_mtime_ns) for f in found]


def read_file(path: Path, limit: int) -> bytearray:
    """Return the bytes of a regular file of at most `limit` bytes, read once; only a `cached` link is followed."""
    try:
        handle = os.open(cached(path) or path, os.O_RDONLY | _NOFOLLOW | _NONBLOCK)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.", "Check the folder.") from None
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise StoreError(f"{path} is not a regular file.", "Copy the file itself into the folder.")
        if info.st_size > limit:
            raise StoreError(
                f"{path} has {info.st_size:,} bytes; an adapter of this model has at most {limit:,}.",
                "Check that this adapter belongs to this model.",
            )
        data = bytearray(info.st_size)
        size = file.readinto(data)
    return data[:size]


def write_folder(folder: str | Path, files: Mapping[str, bytes]) -> Path:
    """Make `folder` hold exactly these peftree files, or leave it unchanged.

    A folder that holds nothing else is exchanged in one step for a complete new one. In a folder with other entries,
    those stay: the complete new files arrive as the sub-folder `NEXT`, which readers prefer; then each is moved
    into place and `NEXT` is removed. An error puts the old files back.

    Raises:
        StoreError: `folder` is a link or a file, or the system refuses to write (BusyError: no space is left).
    """
    path = target(folder)
    try:
        return _write_folder(path, files)
    except OSError as error:
        raise unwritten(path, error) from None


def _write_folder(path: Path, files: Mapping[str, bytes]) -> Path:
    others = path.is_dir() and (any(n not in OURS for n in os.listdir(path)) or path == Path.cwd())
    stage = stage_for(path)
    try:
        for name, data in files.items():
            _write(stage / name, data)
        os.chmod(stage, stat.S_IMODE(path.stat().st_mode) if path.is_dir() else OPEN)
        sync_folder(stage)
        if others:
            _move_in(stage, path, list(files))
            sync_folder(path)
        else:
            put_in_place(stage, path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    sync_folder(path.parent)
    return path


def target(folder: str | Path) -> Path:
    """Return the absolute path of a folder to write, and create its parent.

    Raises:
        StoreError: it is a link or a file.
    """
    path = Path(os.path.abspath(named(folder)))  # resolve() would follow a link
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise StoreError(f"{path} is a link or a file.", "Save to another folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path.parent} cannot be created: {error.strerror}.", "Save to another folder.") from None
    return path


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(path, 0o644)


def put_in_place(stage: Path, path: Path) -> None:
    """Put the complete folder `stage` at `path`; what was there is removed by the caller with `stage`."""
    if not path.is_dir() or not os.listdir(path):
        os.replace(stage, path)
    elif not _exchange(stage, path):
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        os.replace(path, aside)
        try:
            os.replace(stage, path)
        except BaseException:
            os.replace(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, so that a killed process leaves one or the other; False if unsupported."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError, AttributeError):
        call = ctypes.CDLL(None).renameat2
        here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's <fcntl.h>
        return int(call(here, os.fsencode(one), here, os.fsencode(other), exchange)) == 0
    return False


def _move_in(stage: Path, path: Path, names: list[str]) -> None:
    """Bring the files of `stage` into `path`, where other entries stay; at any time, old or new files are complete."""
    if newest(path) != path:  # a save that was killed at its very end: what it brought is what is there
        _settle(path / NEXT, path)
    kept = [name for name in OURS if (path / name).is_symlink() or (path / name).exists()]
    for name in kept:
        if (path / name).is_symlink():
            raise StoreError(f"{path / name} is a link.", "Remove it, or save to another folder.")
    old = stage.with_name(f"{stage.name}-old")
    old.mkdir()
    try:
        for name in kept:
            os.link(path / name, old / name)
        os.replace(stage, path / NEXT)
        sync_folder(path)
        _settle(path / NEXT, path)
    except BaseException:
        shutil.rmtree(path / NEXT, ignore_errors=True)
        for name in set(names) - set(kept):
            (path / name).unlink(missing_ok=True)
        for name in os.listdir(old):
            os.replace(old / name, path / name)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _settle(inner: Path, path: Path) -> None:
    """Move the files of `inner` into `path`, drop peftree files that it lacks, and remove it in one step."""
    names = [name for name in OURS if (inner / name).is_file()]
    for name in names:
        spare = inner / f"{name}.link"
        spare.unlink(missing_ok=True)
        os.link(inner / name, spare)
        os.replace(spare, path / name)
    for name in set(OURS) - set(names):
        (path / name).unlink(missing_ok=True)
    gone = inner.with_name(f"{NEXT}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(inner, gone)
    shutil.rmtree(gone, ignore_errors=True)
