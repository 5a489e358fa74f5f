"""Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftree import registry
from peftree.adapter import Adapter, check_free
from peftree.errors import ConfigError, StoreError, did_you_mean
from peftree.files import read_json, sha256
from peftree.methods.contract import Method
from peftree.store import build, native
from peftree.store.build import Draft, Entries
from peftree.store.folder import CONFIG, MANIFEST, PEFT
from peftree.store.hfpeft.adalora import AdaLora
from peftree.store.hfpeft.dialect import Dialect, View
from peftree.store.hfpeft.links import PREFIX, InexpressibleError, Link, decoded, encoded, head_links
from peftree.store.hfpeft.lora import Dora, Lora
from peftree.store.hfpeft.names import saved_modules, saves_heads
from peftree.store.hfpeft.scales import Ia3, Norms
from peftree.store.hfpeft.schema import Common, kept, parse
from peftree.store.hfpeft.spectral import Fourier, Oft, Vera
from peftree.store.hfpeft.tokens import Adaption, Prefix, Prompt
from peftree.store.manifest import describe, method_of, read_manifest
from peftree.store.tensors import Entry, header, pack, view

__all__ = ["DIALECTS", "InexpressibleError", "files", "read"]

DIALECTS: tuple[Dialect[Any], ...] = (
    Lora(), Dora(), AdaLora(), Vera(), Oft(), Fourier(), Norms(), Ia3(), Prompt(), Prefix(), Adaption(),
)  # fmt: skip
_NEEDS_HEAD = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_BASE = ".base_layer.weight"
_KEPT: WeakKeyDictionary[Adapter, dict[str, Any]] = WeakKeyDictionary()


def files(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of an adapter in PEFT's format, with our manifest, by name.

    Raises:
        InexpressibleError: it has no exact form there.
    """
    dialect = next((d for d in DIALECTS if d.writes(adapter.method)), None)
    if dialect is None:
        raise InexpressibleError(f"PEFT has no method that equals {adapter.method.name}")
    work = Work(dialect, adapter.graft.model, adapter.method, adapter.entries)
    own = dialect.config(work.view)
    state = adapter.state()
    rest = {k: t.flatten().tolist() for k, t in state.items() if k.rpartition("/")[2] in dialect.rest}
    weights = pack(encoded(work.links(), state) | dialect.extras(work.view))
    config = _config(dialect, adapter, work, own)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    entries = header(bytearray(weights), PEFT)
    manifest = describe(adapter, "peft", entries, sha256(weights), _canonical(config), _KEPT.get(adapter), rest)
    return {PEFT: weights, CONFIG: text.encode(), MANIFEST: manifest.text()}


class Work:
    """A dialect at work on one adapter: the method's places, the task head's, and the links of both."""

    def __init__(
        self, dialect: Dialect[Any], model: nn.Module, method: Method, keyed: Entries, config: Common | None = None
    ) -> None:
        self.dialect = dialect
        self.heads = [e for e in keyed if e[0].endswith("/head") and set(e[2].state_dict()) <= {"value", "offset"}]
        self.view = View(model, method, [e for e in keyed if e not in self.heads], config)

    def links(self) -> list[Link]:
        """Return the links of every tensor."""
        return self.dialect.links(self.view) + head_links(self.heads)


def _config(dialect: Dialect[Any], adapter: Adapter, work: Work, own: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    model = work.view.model
    base = model.__dict__.get("config")
    name = getattr(base, "_name_or_path", None)
    heads = [site.path for _, site, _ in work.heads]
    shared = {
        "peft_type": dialect.peft_type,
        "task_type": _task(model, bool(heads)),
        "base_model_name_or_path": name or None,
        "inference_mode": True,
        "modules_to_save": saved_modules(model, heads) if heads else None,
    }
    made = dialect.schema.model_validate(shared | own)
    written: dict[str, Any] = made.model_dump(exclude_unset=True)
    return _KEPT.get(adapter, {}) | written


def _task(model: nn.Module, head: bool) -> str | None:
    names = [c.__name__ for c in type(model).__mro__]
    if any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names):
        return "CAUSAL_LM"
    if getattr(model.__dict__.get("config"), "is_encoder_decoder", False):
        if getattr(type(model), "main_input_name", "") != "input_ids":
            return None
        return "SEQ_2_SEQ_LM" if any(n.endswith("ForConditionalGeneration") for n in names) else None
    if head:
        return next((t for end, t in _NEEDS_HEAD.items() if any(n.endswith(end) for n in names)), None)
    return None


def _canonical(config: Mapping[str, Any]) -> str:
    return sha256(json.dumps(config, sort_keys=True).encode())


def read(
    model: nn.Module, folder: Path, name: str | None, allow_other_base: bool, ours: bool
) -> tuple[str, Draft, dict[str, Any]]:
    """Read and check a PEFT folder and return name, filled draft and kept keys; the model is not changed.

    Args:
        ours: there is a manifest of ours beside it, which says more than the config.

    Raises:
        StoreError, MethodError, ConfigError, SiteError, AdapterError: the first check that fails.
    """
    where, path = folder / CONFIG, folder / PEFT
    raw = read_json(where)
    manifest = read_manifest(folder / MANIFEST) if ours else None
    if manifest is not None and (manifest.layout != "peft" or manifest.config != _canonical(raw)):
        raise StoreError(
            f"{where} is not the file that was saved with {MANIFEST}.",
            f"If it was changed on purpose, remove {MANIFEST} to read this as a plain PEFT folder.",
        )
    data, entries = native.read_weights(model, path, manifest)
    dialect = _dialect(raw, where)
    config = parse(dialect.schema, raw, where)
    method = _method(dialect, config, model, where) if manifest is None else method_of(manifest, folder / MANIFEST)
    if not dialect.writes(method):
        raise StoreError(f"{where} is of {dialect.peft_type}, not of {method.name}.", "Fetch the adapter again.")
    name = name or (manifest.name if manifest else "default")
    check_free(model, name)
    if manifest is not None:
        native.check_base(manifest, model, folder, allow_other_base)
    head = saves_heads(model, config.modules_to_save, where) if manifest is None else manifest.head
    seed = manifest.seed if manifest else 0
    foreign = config if manifest is None else None
    try:
        draft = _drafted(dialect, model, method, head, seed, path, data, entries, foreign)
    except InexpressibleError as error:
        raise StoreError(f"{where}: {error.reason}.", "Load this adapter with peft.") from None
    if manifest is not None:
        _restore(draft, manifest.rest, dialect.rest, folder / MANIFEST)
    return name, draft, manifest.kept if manifest else kept(config)


def _dialect(raw: Mapping[str, Any], where: Path) -> Dialect[Any]:
    known = {d.peft_type: d for d in DIALECTS}
    asked = str(raw.get("peft_type"))[:80]
    if asked not in known:
        raise StoreError(f"{where}: peftree reads no adapters of peft_type {asked!r}.", did_you_mean(asked, known))
    return next((d for d in DIALECTS if d.peft_type == asked and d.reads(raw)), known[asked])


def _method(dialect: Dialect[Any], config: Common, model: nn.Module, where: Path) -> Method:
    name, fields = dialect.method(config, model, where)
    try:
        return registry.make(name, fields)
    except ConfigError as error:
        raise StoreError(f"{where}: {error.what}", error.fix) from None


def _drafted(
    dialect: Dialect[Any],
    model: nn.Module,
    method: Method,
    head: bool,
    seed: int,
    path: Path,
    data: bytearray,
    entries: dict[str, Entry],
    config: Common | None,
) -> Draft:
    """Compare the file with the links' tensors, by shapes alone; then build the adapter and fill it in."""
    draft = build.expected(model, method, head, seed)
    work = Work(dialect, model, method, draft.keyed, config)
    shapes = {n: t.shape for n, t in encoded(work.links(), draft.state()).items()}
    entries = _without_base(model, data, entries, set(shapes))
    known = dialect.extras(work.view)
    extra = {n: view(data, n, e) for n, e in entries.items() if n in known and e.shape == known[n].shape}
    entries = {n: e for n, e in entries.items() if n not in extra}
    given = {n: e.shape for n, e in entries.items()}
    build.compare(str(path), shapes, given)
    draft = build.real(model, method, head, seed, set(draft.state()))
    tensors = {n: view(data, n, e) for n, e in entries.items()}
    work = Work(dialect, model, method, draft.keyed, config)
    _check_extras(dialect.extras(work.view), extra, path)
    build.fill(model, draft, decoded(work.links(), tensors), str(path))
    return draft


def _restore(draft: Draft, rest: Mapping[str, list[bool]], names: Sequence[str], where: Path) -> None:
    """Set the flags that the manifest keeps."""
    state = {k: t for k, t in draft.state().items() if k.rpartition("/")[2] in names}
    if {k: t.numel() for k, t in state.items()} != {k: len(v) for k, v in rest.items()}:
        raise StoreError(f"{where}: rest does not fit the adapter.", "The file is damaged; fetch the adapter again.")
    for key, tensor in state.items():
        tensor.copy_(torch.tensor(rest[key]).view(tensor.shape))


def _check_extras(known: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    """Raise StoreError unless frozen random tensors of a file are those that its seed gives here."""
    for name, tensor in given.items():
        if not torch.equal(tensor.to(known[name].dtype), known[name].cpu()):
            raise StoreError(
                f"{path}: {name} is not what the seed in the config gives.",
                "It was drawn by another program or system; load this adapter with peft.",
            )


def _without_base(model: nn.Module, data: bytearray, entries: dict[str, Entry], known: set[str]) -> dict[str, Entry]:
    """Return the entries without copies of the base's own weights, which PEFT adds for embeddings."""
    frozen = dict(model.named_parameters())

    def copied(name: str) -> bool:
        if name in known or not name.startswith(PREFIX) or not name.endswith(_BASE):
            return False
        weight = frozen.get(name.removeprefix(PREFIX).removesuffix(_BASE) + ".weight")
        entry = entries[name]
        if weight is None or weight.is_meta or entry.shape != weight.shape:
            return False
        return torch.equal(view(data, name, entry).to(weight.dtype), weight.detach().cpu())

    return {name: entry for name, entry in entries.items() if not copied(name)}


def remember(adapter: Adapter, keys: dict[str, Any]) -> None:
    """Keep the unknown keys of the file an adapter was read from, for when it is written again."""
    if keys:
        _KEPT[adapter] = keys
