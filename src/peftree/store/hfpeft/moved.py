"""Names of modules that transformers has moved since a file was written: its list of renamings is applied."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from peftree.sites.parts import aliases_of, modules_of
from peftree.store.hfpeft.links import PREFIX

T = TypeVar("T")
_OURS = re.compile(r"(?:base_layer\.)*(?:lora_|vera_|oft_|fourierft_|ia3_|ln_tuning|token_adapter)")


def renamed(model: nn.Module, named: Mapping[str, T]) -> dict[str, T]:
    """Return what is `named` in a file, under the names that this model's modules have now.

    Only names that this model does not have are changed, and only to names that it has.
    """
    places = {*modules_of(model), *aliases_of(model)}
    strange = [name for name in named if name.startswith(PREFIX) and not _known(places, name.removeprefix(PREFIX))]
    if not strange or not isinstance(model, PreTrainedModel):
        return dict(named)
    moves = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    new: dict[str, str] = {}
    for name in strange:
        now = rename_source_key(name.removeprefix(PREFIX), moves, [])[0]
        first = f"{model.base_model_prefix}."
        good = [n for n in (now, first + now, now.removeprefix(first)) if _known(places, n)]
        if good and PREFIX + good[0] not in named:
            new[name] = PREFIX + good[0]
    return {new.get(name, name): value for name, value in named.items()}


def _known(places: set[str], name: str) -> bool:
    """Return whether a name is that of a tensor at a module of the model, its own or a method's."""
    parts = name.split(".")
    path, rest = next(
        (
            (".".join(parts[:i]), ".".join(parts[i:]))
            for i in range(len(parts) - 1, -1, -1)
            if ".".join(parts[:i]) in places
        ),
        ("", name),
    )
    return _OURS.match(rest) is not None or (path != "" and "." not in rest)
