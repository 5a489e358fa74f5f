"""Atomic file writing and bounded reading: nothing half-written is ever left behind."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from peftree.errors import StoreError, unwritten


def cache_root() -> Path:
    """Return the cache folder: ``$PEFTREE_CACHE``, else ``~/.cache/peftree``."""
    return Path(os.environ.get("PEFTREE_CACHE") or "~/.cache/peftree").expanduser().absolute()


def atomic_write(path: str | Path, data: bytes | str) -> Path:
    """Write `data` to `path` through a temporary file in the same folder, fsync, rename.

    The parent folder is created. A reader sees the old file or the new one, never a part.

    Raises:
        StoreError: the system refuses to write there (BusyError: no space is left).
    """
    path = Path(path)
    try:
        return _written(path, data.encode() if isinstance(data, str) else data)
    except OSError as error:
        raise unwritten(path, error) from None


def _written(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return path


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def stage_for(path: Path) -> Path:
    """Return a new temporary folder beside `path`."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        StoreError: the file is missing, not a regular file, or larger than `limit`.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(f"{path} does not exist or is not a file.", "Check the folder's name.")
    size = path.stat().st_size
    if size > limit:
        raise StoreError(
            f"{path} has {size:,} bytes; at most {limit:,} are read.",
            "This is not a file that peftree writes; fetch the adapter again.",
        )
    return path.read_bytes()


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; ValueError if it has a key twice."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"duplicate key {key!r}")
        out[key] = value
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_json(path: str | Path, limit: int = 1 << 20, depth: int = 16) -> dict[str, Any]:
    """Read one JSON object with limits: size, nesting, no duplicate keys, no NaN.

    Raises:
        StoreError: the file is not one well-formed object within the limits.
    """
    raw = read_bytes(path, limit)
    try:
        return parse_object(raw, depth)
    except (ValueError, RecursionError) as error:
        advice = "The file is damaged, or peftree did not write it; fetch or save the adapter again."
        raise StoreError(f"{path} is not valid JSON: {error}.", advice) from None


def parse_object(raw: bytes, depth: int = 16) -> dict[str, Any]:
    """Parse one JSON object in UTF-8: no duplicate keys, no NaN, at most `depth` levels.

    Raises:
        ValueError: the text is anything else.
    """
    text = raw.decode("utf-8")
    if _depth(text) > depth:
        raise ValueError(f"nested deeper than {depth}")
    value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def _depth(text: str) -> int:
    """Return the deepest bracket nesting of JSON `text` outside strings."""
    deepest = level = 0
    quoted = escaped = False
    for char in text:
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "[{":
            level += 1
            deepest = max(deepest, level)
        elif char in "]}":
            level -= 1
    return deepest


def load_module(path: Path, package: str) -> ModuleType:
    """Return the module of a file: imported from `package` if it lies in that folder of peftree, else from its path."""
    home = Path(__file__).parent.joinpath(*package.split(".")[1:])
    if path.is_relative_to(home):
        return importlib.import_module(".".join([package, *path.relative_to(home).with_suffix("").parts]))
    name = f"peftree_plugin_{path.parent.name}_{path.stem}"  # no dots: pickle finds it in sys.modules
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
