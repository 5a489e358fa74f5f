"""The manifest beside an adapter's weights: how it was made, what the files hold, and for which base."""

from __future__ import annotations

import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftree import registry
from peftree.adapter import Adapter
from peftree.errors import StoreError
from peftree.files import read_json, sha256
from peftree.methods.contract import Method
from peftree.store.fingerprint import Fingerprint, fingerprint
from peftree.store.tensors import NAMES, Entry
from peftree.strict import Strict, explain

FORMAT = 2
LIMIT = 1 << 22
_ADVICE = "The file is damaged, or not peftree's; fetch or save the adapter again."
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Stored(BaseModel):
    """One tensor of the weights file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    shape: list[int]
    dtype: str


class Manifest(Strict):
    """Everything about a saved adapter that its tensors do not tell.

    Attributes:
        format: the version of this layout.
        peftree: the version of the package that wrote it.
        layout: `native` or `peft`, the naming of the tensors.
        name: the adapter's name.
        method: `{"method": name, "fields": {...}}`.
        seed: the seed of its random tensors and frozen random bases.
        head: whether it holds its own copy of the task head.
        sites: every place that it adapts, as `tower:role@layer path`.
        weights: SHA-256 of the weights file.
        config: SHA-256 of `adapter_config.json` as canonical JSON (`peft` layout only).
        kept: keys of a foreign `adapter_config.json` that peftree does not use; saving writes them back.
        tensors: what the weights file holds.
        rest: flags of the adapter that the weights file cannot hold (`peft` layout only).
        base: the base model it was made for.
    """

    format: Annotated[int, Field(ge=FORMAT)]
    peftree: str
    layout: Literal["native", "peft"]
    name: str
    method: dict[str, Any]
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]
    head: bool
    sites: list[str]
    weights: Hash
    config: Hash | None = None
    kept: dict[str, Any] = Field(default_factory=dict)
    tensors: dict[str, Stored]
    rest: dict[str, list[bool]] = Field(default_factory=dict)
    base: Fingerprint

    def text(self) -> bytes:
        """Return the file's content, with a hash of it all under `seal`."""
        content = self.model_dump()
        return (json.dumps(content | {"seal": _seal(content)}, indent=1, allow_nan=False) + "\n").encode()


def _seal(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode())


def describe(
    adapter: Adapter, layout: Literal["native", "peft"], entries: dict[str, Entry], weights: str,
    config: str | None = None, kept: dict[str, Any] | None = None, rest: dict[str, list[bool]] | None = None,
) -> Manifest:  # fmt: skip
    """Return the manifest of an adapter whose weights file has these entries and this SHA-256."""
    return Manifest(
        format=FORMAT, peftree=_version(), layout=layout, name=adapter.name, method=registry.spec(adapter.method),
        seed=adapter.seed, head=adapter.head, weights=weights, config=config, kept=kept or {}, rest=rest or {},
        sites=[f"{site.name} {site.path}" for _, site, _ in adapter.entries],
        tensors={n: Stored(shape=list(e.shape), dtype=NAMES[e.dtype]) for n, e in entries.items()},
        base=fingerprint(adapter.graft.model, again=True),
    )  # fmt: skip


def _version() -> str:
    try:
        return version("peftree")
    except PackageNotFoundError:
        return "unknown"


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        StoreError: it is damaged, or a later version wrote it.
    """
    raw = read_json(path, LIMIT)
    written = raw.get("format")
    if type(written) is int and written > FORMAT:
        raise StoreError(f"{path} has the format {written}; this peftree reads up to {FORMAT}.", "Update peftree.")
    if not _printable(raw):
        raise StoreError(f"{path} holds unprintable text.", _ADVICE)
    if raw.pop("seal", None) != _seal(raw):
        raise StoreError(f"{path} was changed or damaged: its content does not match its seal.", _ADVICE)
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise StoreError(explain(error, Manifest, str(path))[0], _ADVICE) from None


def _printable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(k.isprintable() and (k == "kept" or _printable(v)) for k, v in value.items())
    return all(map(_printable, value)) if isinstance(value, list) else not isinstance(value, str) or value.isprintable()


def method_of(manifest: Manifest, path: Path) -> Method:
    """Return the method that a manifest names.

    Raises:
        StoreError, MethodError, ConfigError: it is not a method, it is unknown, or a field is out of range.
    """
    try:
        made = registry.from_spec(manifest.method)
    except (ValidationError, TypeError) as error:
        raise StoreError(f"{path}: the method is malformed: {str(error)[:200]}.", _ADVICE) from None
    if not isinstance(made, Method) or not _sound(made):
        raise StoreError(f"{path}: the method is malformed: {str(manifest.method)[:200]!r}.", _ADVICE)
    return made


def _sound(method: Method) -> bool:
    """Return whether every part of a composite method is a method, and numbers fit the members."""
    values = {name: getattr(method, name) for name in type(method).model_fields}
    members = values.get("members", [])
    if not all(isinstance(m, Method) and _sound(m) for m in members):
        return False
    weights = values.get("weights")
    return weights is None or (len(weights) == len(members) and all(math.isfinite(w) for w in weights))


def check_tensors(manifest: Manifest, entries: dict[str, Entry], path: Path) -> None:
    """Raise StoreError unless the weights file holds what the manifest lists."""
    listed = {n: (list(s.shape), s.dtype) for n, s in manifest.tensors.items()}
    if listed != {n: (list(e.shape), NAMES[e.dtype]) for n, e in entries.items()}:
        raise StoreError(f"{path} and the weights file list different tensors.", _ADVICE)
