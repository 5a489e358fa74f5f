"""Store: adapters to folders and back, in peftree's own format and in that of Hugging Face PEFT."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Literal

from torch import nn

from peftree import sites as site_tree
from peftree.adapter import Adapter, adapt, install
from peftree.errors import AdapterError, StoreError, did_you_mean
from peftree.store import hfpeft, native, plain
from peftree.store.build import Draft
from peftree.store.fingerprint import Fingerprint, fingerprint
from peftree.store.folder import CONFIG, MANIFEST, NATIVE, PEFT, listing, named, newest, stamp, write_folder
from peftree.store.hotswap import copy_in, movable
from peftree.store.merged import an_adapter, export

__all__ = ["Fingerprint", "export", "fingerprint", "from_peft", "load", "replace", "save"]

Format = Literal["auto", "native", "peft"]
RACES = 20  # times that a folder is read again if somebody saves into it meanwhile


def save(adapter: Adapter, folder: str | Path, *, format: Format = "auto") -> Path:  # noqa: A002
    """Write an adapter to `folder`, completely or not at all, and return the folder's path.

    Args:
        adapter: an adapter on a model; the base model is not written.
        folder: created if needed; an adapter in it is replaced once the new one is complete.
        format: `peft` is Hugging Face PEFT's `adapter_config.json` and `adapter_model.safetensors`, `native` our
            `adapter.safetensors`; both include our `manifest.json`. `auto` is `peft` where that exists and is
            exact, else `native`.

    Raises:
        StoreError: a tensor is not finite, or the format asked for cannot hold the adapter exactly.
        AdapterError: the adapter was detached, or the shapes of its model have changed.
    """
    if format not in ("auto", "native", "peft"):
        raise StoreError(f"There is no format {format!r}.", did_you_mean(str(format), ("auto", "native", "peft")))
    an_adapter(adapter).graft.check([adapter.name])
    with site_tree.unchanged():
        files: dict[str, bytes] | None = None
        if format != "native":
            try:
                files = hfpeft.files(adapter)
            except hfpeft.InexpressibleError:
                if format == "peft":
                    raise
        files = files or native.files(adapter)
    return write_folder(folder, files)


def from_peft(model: nn.Module, config: Any, *, name: str = "default", seed: int = 0) -> Adapter:
    """Put a new adapter on `model` as described by a Hugging Face PEFT config, and return it.

    It sits at the same modules and has the same trained tensors as PEFT's. They start as our method's do: PEFT's
    default, except for the embedding behind a prefix network (here N(0, 0.02), there N(0, 1)) and prompts (here rows of
    the vocabulary). Random values are drawn from `seed`.

    Args:
        model: the base model.
        config: an object such as `peft.LoraConfig(...)` or any with `to_dict`, a dict, or the path of an
            `adapter_config.json` or its folder. A pattern is run if it comes from your own object or dict, never if
            it comes from a file.
        name: the adapter's name on the model.
        seed: the seed of its random tensors.

    Raises:
        StoreError: it is not a config, or asks for something that peftree cannot do exactly.
        ConfigError, MethodError, SiteError, AdapterError: the method, a field, a site or the name is invalid.
    """
    method, head = hfpeft.method_from(model, config)
    return adapt(model, method, name=name, head=head, seed=seed)


def load(
    model: nn.Module, folder: str | Path, *, name: str | None = None, trainable: bool = True,
    allow_other_base: bool = False,
) -> Adapter:  # fmt: skip
    """Put the adapter in `folder` on `model`, switch it on, and return it. The files tell the format.

    Everything is checked before the model is changed: file hashes, header, method and fields, base, the names of the
    tensors, their shapes and values.

    Args:
        model: the base model, of the class that the adapter was made for.
        folder: what `save` or PEFT's `save_pretrained` wrote.
        name: its name on the model; None: the name it was saved with.
        trainable: whether its tensors are trained.
        allow_other_base: load it on a base that it was not made for, if all shapes fit.

    Raises:
        StoreError: a file is missing, damaged, unsafe, or made for another base or method.
        ConfigError, MethodError, SiteError, AdapterError: the method, a field, a site or the name is invalid.
    """
    called, draft, kept = _read(model, named(folder), name, allow_other_base)
    adapter = install(model, called, draft.method, draft.entries, draft.head, draft.seed).requires_grad(trainable)
    hfpeft.remember(adapter, kept, draft.foreign)
    return adapter


def replace(adapter: Adapter, source: Adapter | str | Path, *, allow_other_base: bool = False) -> Adapter:
    """Give an adapter the values of another of the same method, fields and shapes, in place, and return it (hot swap).

    Its tensors stay the same objects, so that what holds them (optimizers, compiled passes, CUDA graphs) sees the new
    values; it keeps its name, its places and whether it is on. Everything is checked before a value is changed.

    Args:
        adapter: on a model, not merged.
        source: an adapter on the same model, which keeps its own values, or a folder, checked as `load` does.
        allow_other_base: as for `load`.

    Raises:
        AdapterError: the two differ in method, fields, places, shapes or dtypes, or `adapter` is merged or detached.
        StoreError: as for `load`.
    """
    model = movable(adapter)
    if not isinstance(source, str | Path):
        if an_adapter(source).model is None:
            raise AdapterError(f"'{source.name}' was detached.", "Replace by it before, or by a folder of it.")
        if source.model is not model:
            raise AdapterError(f"'{source.name}' is not on the model of '{adapter.name}'.", "Save it; pass the folder.")
        copy_in(adapter, source, f"'{source.name}'", hfpeft.kept_of(source))
        return adapter
    unused = f"r{secrets.token_hex(8)}"  # it is read, not put on
    _, draft, kept = _read(model, named(source), unused, allow_other_base)
    copy_in(adapter, draft, f"the adapter in {source}", kept)
    return adapter


def _read(model: nn.Module, folder: Path, name: str | None, other: bool) -> tuple[str, Draft, dict[str, Any]]:
    """Return name, filled draft and kept keys of the adapter in a folder, read again if it is saved meanwhile."""
    for tries in reversed(range(RACES)):
        before = stamp(folder)
        try:
            return _read_once(model, newest(folder), name, other)
        except StoreError:
            if not tries or stamp(folder) == before:
                raise
    raise AssertionError


@site_tree.unchanged()
def _read_once(model: nn.Module, path: Path, name: str | None, other: bool) -> tuple[str, Draft, dict[str, Any]]:
    found = listing(path)
    if {NATIVE, PEFT} <= found:
        raise StoreError(f"{path} holds both {NATIVE} and {PEFT}.", "Remove the one that you do not want.")
    if CONFIG in found:
        return hfpeft.read(model, path, name, other, MANIFEST in found)
    if MANIFEST in found:
        return native.read(model, path, name, other)
    raise StoreError(
        f"{path} holds no adapter: it has neither {MANIFEST} nor {CONFIG}.",
        "Name the folder that peftree.save(adapter, folder) wrote.",
    )


plain.install(save)
