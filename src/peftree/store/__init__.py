"""Store: adapters to folders and back, in peftree's own format and in that of Hugging Face PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from peftree.adapter import Adapter, install
from peftree.errors import StoreError, did_you_mean
from peftree.store import hfpeft, native
from peftree.store.fingerprint import Fingerprint, fingerprint
from peftree.store.folder import CONFIG, MANIFEST, NATIVE, PEFT, listing, write_folder
from peftree.store.merged import export

__all__ = ["Fingerprint", "export", "fingerprint", "load", "save"]

Format = Literal["auto", "native", "peft"]


def save(adapter: Adapter, folder: str | Path, *, format: Format = "auto") -> Path:  # noqa: A002
    """Write an adapter to `folder`, wholly or not at all, and return the folder's path.

    Args:
        adapter: an adapter on a model; the base model is not written.
        folder: made if need be; an adapter in it is replaced once the new one is complete.
        format: `peft` is Hugging Face PEFT's `adapter_config.json` and `adapter_model.safetensors`, `native` our
            `adapter.safetensors`; both have our `manifest.json` beside them. `auto` is `peft` where it exists and is
            exact, else `native`.

    Raises:
        StoreError: a tensor is not finite, or the format asked for cannot hold the adapter exactly.
        AdapterError: the adapter was detached.
    """
    if format not in ("auto", "native", "peft"):
        raise StoreError(f"There is no format {format!r}.", did_you_mean(str(format), ("auto", "native", "peft")))
    files: dict[str, bytes] | None = None
    if format != "native":
        try:
            files = hfpeft.files(adapter)
        except hfpeft.InexpressibleError:
            if format == "peft":
                raise
    return write_folder(folder, files or native.files(adapter))


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    trainable: bool = True,
    allow_other_base: bool = False,
) -> Adapter:
    """Put the adapter of `folder` on `model`, switch it on, and return it. The format is found from the files.

    Everything is checked before the model is changed: file hashes, header, method and fields, base, the set of
    tensors, their shapes and values.

    Args:
        model: the base model, of the class the adapter was made for.
        folder: what `save` or PEFT's `save_pretrained` wrote.
        name: on the model; None: the name it was saved with.
        trainable: whether its tensors take gradients.
        allow_other_base: load it on another base than it was made for, if all shapes fit.

    Raises:
        StoreError: a file is missing, damaged, unsafe, or made for another base or method.
        ConfigError, MethodError, SiteError, AdapterError: the method, a field, a site or the name is not good.
    """
    path = Path(folder)
    found = listing(path)
    if {NATIVE, PEFT} <= found:
        raise StoreError(f"{path} holds both {NATIVE} and {PEFT}.", "Remove the one that is not wanted.")
    if CONFIG in found:
        name, draft, kept = hfpeft.read(model, path, name, allow_other_base, MANIFEST in found)
    elif MANIFEST in found:
        name, draft, kept = native.read(model, path, name, allow_other_base)
    else:
        raise StoreError(
            f"{path} holds no adapter: neither {MANIFEST} nor {CONFIG} is there.",
            "Name the folder that adapter.save(folder) wrote.",
        )
    adapter = install(model, name, draft.method, draft.entries, draft.head, draft.seed).requires_grad(trainable)
    hfpeft.remember(adapter, kept)
    return adapter
