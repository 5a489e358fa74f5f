"""Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, written and read."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftree import registry
from peftree import sites as site_tree
from peftree.adapter import Adapter, check_free
from peftree.errors import ConfigError, PeftreeWarning, StoreError
from peftree.files import read_json, sha256
from peftree.making import Entries
from peftree.methods.contract import Method
from peftree.store import build, native
from peftree.store.build import Draft
from peftree.store.folder import CONFIG, MANIFEST, PEFT
from peftree.store.hfpeft import fresh, moved, whole
from peftree.store.hfpeft.adalora import AdaLora
from peftree.store.hfpeft.declared import declared
from peftree.store.hfpeft.dialect import Dialect, View, exactly
from peftree.store.hfpeft.links import PREFIX, InexpressibleError, Link, decoded, encoded, head_links
from peftree.store.hfpeft.lora import Dora, Lora, LoraFields
from peftree.store.hfpeft.scales import Ia3, Norms
from peftree.store.hfpeft.schema import Common, parse
from peftree.store.hfpeft.spectral import Fourier, Oft, Vera
from peftree.store.hfpeft.tokens import Adaption, Prefix, Prompt, PTuning
from peftree.store.manifest import describe, method_of, read_manifest
from peftree.store.tensors import Entry, header, pack, view

__all__ = ["InexpressibleError", "dialects", "files", "method_from", "read"]

_OWN: tuple[Dialect[Any], ...] = (
    Lora(), Dora(), AdaLora(), Vera(), Oft(), Fourier(), Norms(), Ia3(), Prompt(), PTuning(), Prefix(), Adaption(),
)  # fmt: skip
_NEEDS_HEAD = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
T = TypeVar("T")
SHOWN = 5  # modules that a warning names
_KEPT: WeakKeyDictionary[Adapter, dict[str, Any]] = WeakKeyDictionary()


def dialects() -> list[Dialect[Any]]:
    """Return the mapping of every method that both libraries have: those written here and those in method files."""
    return [*_OWN, *declared()]


def files(adapter: Adapter) -> dict[str, bytes]:
    """Return the files of an adapter in PEFT's format, with our manifest, by name.

    Raises:
        InexpressibleError: it has no exact form in PEFT.
    """
    _, main, _ = whole.split(adapter.method)
    dialect = next((d for d in dialects() if d.writes(main)), None)
    if dialect is None:
        raise InexpressibleError(f"PEFT has no method that equals {adapter.method.name}")
    work = Work(dialect, adapter.graft.model, adapter.method, adapter.entries)
    mixed = sorted(set(main.by_site) - set(main.by_site if dialect.sited is None else dialect.sited))
    if mixed:
        raise InexpressibleError(f"{', '.join(mixed)} differs between its sites")
    own = dialect.config(work.view)
    own |= whole.config(work.view.model, [site.path for _, site, _ in work.heads], work.whole, work.view.paths)
    state = adapter.state()
    rest = {k: t.flatten().tolist() for k, t in state.items() if k.rpartition("/")[2] in dialect.rest}
    _tell_of_reads(adapter, work)
    weights = pack(_renamed(encoded(work.links(), state) | dialect.extras(work.view), PREFIX, dialect.root))
    config = _config(dialect, adapter, work, own)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    entries = header(weights, PEFT)
    manifest = describe(adapter, "peft", entries, sha256(weights), _canonical(config), _KEPT.get(adapter), rest)
    return {PEFT: weights, CONFIG: text.encode(), MANIFEST: manifest.text()}


def _tell_of_reads(adapter: Adapter, work: Work) -> None:
    """Warn of places where PEFT changes nothing: it acts when a module is called, and the model reads the weight."""
    held, read = work.view.model.get_submodule, adapter.graft.shared.outside
    found = [p for p in work.places if p in read or isinstance(held(p.rpartition(".")[0]), nn.MultiheadAttention)]
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        warnings.warn(
            f"PEFT will give other outputs: the model reads the weight of {', '.join(found[:SHOWN])}{more} without "
            "calling the module, where PEFT changes nothing. Merge the adapter for other programs (peftree.merge, or "
            "peftree.export with to='merged'), or adapt other sites. For peftree only: format='native'.",
            PeftreeWarning, stacklevel=4,
        )  # fmt: skip


class Work:
    """A dialect at work on one adapter: the method's places, the task head's, and the links of both."""

    def __init__(
        self, dialect: Dialect[Any], model: nn.Module, method: Method, keyed: Entries, config: Common | None = None
    ) -> None:
        self.dialect = dialect
        index, main, beside = whole.split(method)
        self.heads = [e for e in keyed if e[0].endswith("/head") and set(e[2].state_dict()) <= {"value", "offset"}]
        rest = [e for e in keyed if not any(e[0] == h[0] for h in self.heads)]
        full = [i for i, part in beside.items() if part.name != "bitfit"]
        self.whole = [e for e in rest if e[2].part in full]
        shifts = [e for e in rest if e[2].part in beside and e[2].part not in full]
        mine = [e for e in rest if e[2].part == index or not beside]
        self.view = View(model, main, mine, config, shifts)

    @property
    def places(self) -> tuple[str, ...]:
        """The modules that the method adapts, but those that train as a whole, and heads, which losses read too."""
        return tuple(dict.fromkeys(s.path for _, s, _ in (*self.view.entries, *self.view.shifts) if s.role != "head"))

    def links(self) -> list[Link]:
        """Return the links of every tensor."""
        beside = whole.links(self.view.model, self.whole, self.view.paths)
        return self.dialect.links(self.view) + beside + head_links(self.heads)


def _config(dialect: Dialect[Any], adapter: Adapter, work: Work, own: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    model = work.view.model
    base = model.__dict__.get("config")
    name = getattr(base, "_name_or_path", None)
    shared = {
        "peft_type": dialect.peft_type, "task_type": _task(model, bool(work.heads)),
        "base_model_name_or_path": name or None, "inference_mode": True,
    }  # fmt: skip
    written: dict[str, Any] = dialect.schema.model_validate(shared | own).model_dump(exclude_unset=True)
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


def _renamed(tensors: Mapping[str, T], old: str, new: str) -> dict[str, T]:
    """Return named tensors, with another prefix for the names that begin with `old`."""
    return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in tensors.items()}


def _canonical(config: Mapping[str, Any]) -> str:
    return sha256(json.dumps(config, sort_keys=True).encode())


def read(
    model: nn.Module, folder: Path, name: str | None, allow_other_base: bool, ours: bool
) -> tuple[str, Draft, dict[str, Any]]:
    """Read and check a PEFT folder and return name, filled draft and kept keys; the model is not changed.

    Args:
        ours: whether peftree's manifest is beside it, which says more than the config.

    Raises:
        StoreError, MethodError, ConfigError, SiteError, AdapterError: the first check that fails.
    """
    where, path = folder / CONFIG, folder / PEFT
    raw = read_json(where)
    manifest = read_manifest(folder / MANIFEST) if ours else None
    if manifest is not None and (manifest.layout != "peft" or manifest.config != _canonical(raw)):
        raise StoreError(
            f"{where} is not the file that was saved with {MANIFEST}.",
            f"If you changed it on purpose, remove {MANIFEST} to read this as a plain PEFT folder.",
        )
    data, entries = native.read_weights(model, path, manifest)
    dialect = _dialect(raw, where)
    entries = _renamed(entries, dialect.root, PREFIX)
    config = parse(dialect.schema, raw, where)
    with exactly(where, not ours):
        if manifest is None:
            method, head, entries = _foreign(dialect, config, model, where, data, entries)
        else:
            method, head = method_of(manifest, folder / MANIFEST), manifest.head
        main = whole.split(method)[1]
    if not dialect.writes(main):
        raise StoreError(f"{where} is for {dialect.peft_type}, not for {method.name}.", "Fetch the adapter again.")
    name = name if name is not None else manifest.name if manifest else "default"
    check_free(model, name)
    if manifest is not None:
        native.check_base(manifest, model, folder, allow_other_base)
    seed = manifest.seed if manifest else 0
    foreign = config if manifest is None else None
    with exactly(where, not ours):
        draft = _drafted(dialect, model, method, head, seed, path, data, entries, foreign)
    if manifest is not None:
        _restore(draft, manifest.rest, dialect.rest, folder / MANIFEST)
    return name, draft, manifest.kept if manifest else config.model_extra or {}


def _dialect(raw: Mapping[str, Any], where: Path) -> Dialect[Any]:
    every = dialects()
    known = {d.peft_type: d for d in reversed(every)}
    asked = str(raw.get("peft_type"))[:80]
    if asked not in known:
        listed = ", ".join(sorted(known))
        raise StoreError(f"{where}: peftree reads no adapters of peft_type {asked!r}.", f"It reads {listed}.")
    return next((d for d in every if d.peft_type == asked and d.reads(raw)), known[asked])


def _method(dialect: Dialect[Any], config: Common, model: nn.Module, where: Path) -> Method:
    name, fields = dialect.method(config, model, where)
    try:
        return registry.make(name, fields)
    except ConfigError as error:
        raise StoreError(f"{where}: {error.what}", error.fix) from None


def method_from(model: nn.Module, given: Any) -> tuple[Method, bool]:
    """Return the method that a PEFT config means on `model`, and whether the task head is trained.

    Raises:
        StoreError: it is not a config, or asks for something that peftree cannot do exactly.
    """
    raw, where, from_file = fresh.plain(given)
    dialect = _dialect(raw, where)
    config = parse(dialect.schema, raw, where)
    if not from_file:
        fresh.place(config, model)
    method = _method(dialect, config, model, where)
    paths = [s.path for s in site_tree.resolve(model, method.sites, method.layers)]
    return fresh.complete(dialect, config, method, model, paths, where)


def _foreign(
    dialect: Dialect[Any], config: Common, model: nn.Module, where: Path, data: bytearray, entries: dict[str, Entry]
) -> tuple[Method, bool, dict[str, Entry]]:
    """Return the method of a plain PEFT folder, whether it has the task head, and the tensors that matter.

    Raises:
        StoreError, InexpressibleError: it asks for something that peftree cannot do exactly.
    """
    entries = moved.renamed(model, entries)
    contents = whole.sort(model, entries)
    if isinstance(config, LoraFields):
        whole.with_tokens(model, contents, config.trainable_token_indices, data, entries)
    config._tensors = contents.method
    method = _method(dialect, config, model, where)
    own = whole.kept(model, contents, config.modules_to_save, data, entries)
    entries = {n: e for n, e in entries.items() if n in own or n not in {*contents.base, *contents.idle}}
    heads = {f"{s.path}.{n}" for s in site_tree.task_head(model) for n, p in _own(model, s.path) if p is not None}
    head = bool(heads) and heads <= {key for name, key in own.items() if whole.BASE not in name}
    keys = [key for key in own.values() if not (head and key in heads)]
    return whole.joined(method, whole.parts_for(model, keys), dialect.beside(config, method)), head, entries


def _own(model: nn.Module, path: str) -> Iterable[tuple[str, Tensor | None]]:
    return model.get_submodule(path)._parameters.items()


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
    """Compare the file with the links' tensors, by shapes alone; then build the adapter and fill it."""
    # No shapes: their files hold the form that post_hoc leaves.
    draft = build.drafted(build.abstract(model), method, head, seed, {})
    work = Work(dialect, model, method, draft.keyed, config)
    # A foreign file has the trained values alone of a start that is taken out of the base.
    derived = dialect.derived if config is not None else ()
    state = {k: t for k, t in draft.state().items() if k.rpartition("/")[2] not in derived}
    shapes = {n: t.shape for n, t in encoded(work.links(), state).items()}
    known = dialect.known(work.view)
    extra = {n: view(data, n, e) for n, e in entries.items() if n in known and e.shape == known[n].shape}
    entries = {n: e for n, e in entries.items() if n not in extra}
    given = {n: e.shape for n, e in entries.items()}
    build.compare(str(path), shapes, given)
    draft = build.drafted(model, method, head, seed, {n: t.shape for n, t in draft.state().items()})
    tensors = {n: view(data, n, e) for n, e in entries.items()}
    work = Work(dialect, model, method, draft.keyed, config)
    _check_extras(dialect.known(work.view), extra, path)
    start = {k: t for k, t in draft.state().items() if k.rpartition("/")[2] in derived}
    build.fill(model, draft, start | decoded(work.links(), tensors), str(path))
    return draft if config is None else replace(draft, foreign=work.places)


def _restore(draft: Draft, rest: Mapping[str, list[bool]], names: Sequence[str], where: Path) -> None:
    """Set the flags that the manifest keeps."""
    state = {k: t for k, t in draft.state().items() if k.rpartition("/")[2] in names}
    if {k: t.numel() for k, t in state.items()} != {k: len(v) for k, v in rest.items()}:
        raise StoreError(f"{where}: rest does not fit the adapter.", "The file is damaged; fetch the adapter again.")
    for key, tensor in state.items():
        tensor.copy_(torch.tensor(rest[key]).view(tensor.shape))


def _check_extras(known: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    """Raise StoreError unless the frozen random tensors of a file are those that its seed generates here."""
    for name, tensor in given.items():
        if not torch.equal(tensor.to(known[name].dtype), known[name].cpu()):
            raise StoreError(
                f"{path}: {name} is not what the config's seed generates.",
                "Another program or system drew it; load this adapter with peft.",
            )


def kept_of(adapter: Adapter) -> dict[str, Any]:
    """Return what `remember` keeps of an adapter."""
    return dict(_KEPT.get(adapter, {}))


def remember(adapter: Adapter, keys: dict[str, Any], foreign: Sequence[str]) -> None:
    """Keep the unknown keys of the file that an adapter was read from, and its places if PEFT wrote it: `foreign`."""
    note = [
        "has a weight that the model reads without calling the module. PEFT changes nothing there, so with the file "
        f"of adapter '{adapter.name}' it gives other outputs than here, unless the adapter has no effect there (what "
        "PEFT trains has none). If you need PEFT's outputs, run the file with peft."
    ]
    notes = adapter.graft.shared.notes
    for at in [at for at in notes if at[0] == adapter.name]:
        del notes[at]
    notes |= {(adapter.name, path): note for path in foreign}
    _KEPT[adapter] = keys
