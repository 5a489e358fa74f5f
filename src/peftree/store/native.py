"""The native format: `adapter.safetensors` with the adapter's own tensor names, and `manifest.json`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftree.adapter import Adapter, check_free
from peftree.errors import StoreError
from peftree.files import sha256
from peftree.store import build
from peftree.store.build import Draft
from peftree.store.fingerprint import difference
from peftree.store.folder import CONFIG, MANIFEST, NATIVE, read_file
from peftree.store.manifest import Manifest, check_tensors, describe, method_of, read_manifest
from peftree.store.tensors import Entry, header, pack, view


def files(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of an adapter in the native format, by name."""
    weights = pack(adapter.state())
    manifest = describe(adapter, "native", header(weights, NATIVE), sha256(weights))
    return {NATIVE: weights, MANIFEST: manifest.text()}


def read(model: nn.Module, folder: Path, name: str | None, allow_other_base: bool) -> tuple[str, Draft, dict[str, Any]]:
    """Read and check a native folder and return name, filled draft and kept keys; the model is not changed.

    Raises:
        StoreError, MethodError, ConfigError, SiteError, AdapterError: the first check that fails.
    """
    path = folder / NATIVE
    manifest = read_manifest(folder / MANIFEST)
    if manifest.layout == "peft":
        raise StoreError(f"{folder} lacks {CONFIG}, which was saved there.", "Fetch or save the adapter again.")
    data, entries = read_weights(model, path, manifest)
    method = method_of(manifest, folder / MANIFEST)
    name = manifest.name if name is None else name
    check_free(model, name)
    check_base(manifest, model, folder, allow_other_base)

    tensors = {n: view(data, n, e) for n, e in entries.items()}
    draft = drafted(model, method, manifest.head, manifest.seed, path, tensors)
    return name, draft, manifest.kept


def read_weights(model: nn.Module, path: Path, manifest: Manifest | None) -> tuple[bytearray, dict[str, Entry]]:
    """Read a weights file once, check its SHA-256 if a manifest has it, and parse its header from those bytes."""
    base = sum(p.numel() for p in model.parameters())
    data = read_file(path, (64 << 20) + 16 * base)
    if manifest is not None and hashlib.sha256(data).hexdigest() != manifest.weights:
        raise StoreError(
            f"{path} is not the file that was saved: its SHA-256 differs from the manifest's.",
            "It was damaged or changed; fetch or save the adapter again.",
        )
    entries = header(data, str(path))
    if manifest is not None:
        check_tensors(manifest, entries, path.with_name(MANIFEST))
    return data, entries


def check_base(manifest: Manifest, model: nn.Module, folder: Path, allow_other_base: bool) -> None:
    """Raise StoreError if the adapter was made for another base."""
    reason = "" if allow_other_base else difference(manifest.base, model)
    if reason:
        raise StoreError(
            f"The adapter in {folder} does not fit this base model: {reason}.",
            "Load it on the base it was trained on, or pass allow_other_base=True if you are sure that it fits.",
        )


def drafted(model: nn.Module, method: Any, head: bool, seed: int, path: Path, tensors: dict[str, Tensor]) -> Draft:
    """Compare the file with what the method has on this model, by shapes alone; then build it and fill it."""
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    expected = build.drafted(build.abstract(model), method, head, seed, shapes)
    build.compare(str(path), {n: t.shape for n, t in expected.state().items()}, shapes)
    draft = build.drafted(model, method, head, seed, shapes)
    build.fill(model, draft, tensors, str(path))
    return draft
