"""Origin: what a packed weight was before it was packed, read from the safetensors that its model was loaded from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from peftree.deltas.packed import is_packed
from peftree.files import read_json
from peftree.sites import Site

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_FILLED = ContextVar("filled", default=False)


@contextlib.contextmanager
def filled() -> Iterator[None]:
    """Inside, deltas are built for values that are at hand, so that a start reads no file."""
    token = _FILLED.set(True)
    try:
        yield
    finally:
        _FILLED.reset(token)


def before_packing(model: nn.Module, module: nn.Module, site: Site, memo: dict[str, Any]) -> Tensor | None:
    """Return the weight at a site `[out, in]` as it was before it was packed; None: it is not, or `filled`.

    Args:
        memo: keeps what is known of the model's files from one site to the next.

    Raises:
        LookupError: the files do not hold it as it is.
    """
    packed = module._parameters.get(site.parameter)
    if packed is None or _FILLED.get() or not is_packed(packed):
        return None
    if "origin" not in memo:
        memo["origin"] = Origin(model)
    W: Tensor = memo["origin"].weight(module, f"{site.path}.{site.parameter}")
    return W[slice(*(site.rows or (None,)))]


class Origin:
    """The tensors of a model's files, by the names that the model has for them.

    Those that transformers joins or divides while it loads them are left out; it tells how it renames the others.

    Attributes:
        folder: where they are.
        found: file and name there, by name in the model.

    Raises:
        LookupError: there are no plain files.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        steps: list[Any] = vars(model).get("_weight_conversions") or []  # those that its loading used
        renamings = [s for s in steps if isinstance(s, WeightRenaming)]
        converters = [s for s in steps if isinstance(s, WeightConverter)]
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        own: dict[str, Any] = {name: True for name, _ in named}
        prefix = str(getattr(model, "base_model_prefix", ""))
        self.folder, files = _listed(model)
        self.found: dict[str, tuple[Path, str]] = {}
        for name, file in files.items():
            renamed, joined = rename_source_key(name, renamings, converters, prefix, own)
            if renamed not in own and name in own:
                renamed, joined = name, None
            if joined is None:
                self.found[renamed] = file, name

    def weight(self, module: Any, name: str) -> Tensor:
        """Return the weight of the packed `module`, of which the model's name is `name`, as `[out, in]`.

        Raises:
            LookupError: the files do not hold it as it is.
        """
        if name not in self.found:
            raise LookupError(f"{self.folder} has no tensor that is {name} alone")
        file, key = self.found[name]
        with safe_open(file, framework="pt") as handle:
            W: Tensor = handle.get_tensor(key)
        source: Any = vars(module).get("source_cls", nn.Linear)  # what bitsandbytes' map was made from
        W = W.t() if "Conv1D" in (kind.__name__ for kind in source.__mro__) else W
        shape = (module.out_features, module.in_features)
        if not W.is_floating_point() or W.shape != shape:
            raise LookupError(f"{key} in {file} is {W.dtype} {list(W.shape)}, not a plain {list(shape)}")
        return W


def _listed(model: nn.Module) -> tuple[str, dict[str, Path]]:
    """Return the folder or hub name of a model, and the file of each tensor by its name there."""
    from transformers.utils.hub import cached_file

    config: Any = vars(model).get("config")
    folder = str(getattr(config, "name_or_path", ""))
    if not folder:
        raise LookupError("the model was not loaded from a folder")
    if getattr(vars(model).get("hf_quantizer"), "pre_quantized", False):
        raise LookupError(f"{folder} is packed itself")
    asked: dict[str, Any] = {"local_files_only": True}
    asked |= {f"_raise_exceptions_for_{n}": False for n in ("missing_entries", "connection_errors", "gated_repo")}

    def path(name: str) -> Path | None:
        with contextlib.suppress(OSError):  # not even the name of a repository
            return Path(found) if (found := cached_file(folder, name, **asked)) else None
        return None

    if whole := path(WHOLE):
        with safe_open(whole, framework="pt") as handle:
            return folder, dict.fromkeys(handle.keys(), whole)
    if (index := path(INDEX)) is None:
        raise LookupError(f"{folder} has neither {WHOLE} nor {INDEX}")
    files: dict[str, str] = read_json(index, 64 << 20)["weight_map"]
    places = {file: path(file) for file in set(files.values())}
    if missing := [file for file, place in places.items() if place is None]:
        raise LookupError(f"{folder} has no {missing[0]}")
    return folder, {name: place for name, file in files.items() if (place := places[file])}
