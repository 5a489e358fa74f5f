"""peftree: every branch of parameter-efficient fine-tuning behind one small contract."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftree.adapter import Adapter as Adapter
    from peftree.adapter import active as active
    from peftree.adapter import adapt as adapt
    from peftree.adapter import adapters as adapters
    from peftree.adapter import context as context
    from peftree.adapter import detach as detach
    from peftree.adapter import disabled as disabled
    from peftree.adapter import route as route
    from peftree.adapter import switch as switch
    from peftree.compose import combine as combine
    from peftree.compose import merge as merge
    from peftree.compose import unmerge as unmerge
    from peftree.errors import PeftreeError as PeftreeError
    from peftree.registry import get as get
    from peftree.store import export as export
    from peftree.store import from_peft as from_peft
    from peftree.store import load as load
    from peftree.store import replace as replace
    from peftree.store import save as save
    from peftree.train.trainer import AdapterTrainer as AdapterTrainer

__version__ = "0.1.0"

_HOMES = {
    "peftree.adapter": ("Adapter", "active", "adapt", "adapters", "context", "detach", "disabled", "route", "switch"),
    "peftree.compose": ("combine", "merge", "unmerge"),
    "peftree.errors": ("PeftreeError",),
    "peftree.registry": ("get",),
    "peftree.store": ("export", "from_peft", "load", "replace", "save"),
    "peftree.train.trainer": ("AdapterTrainer",),
}  # fmt: skip
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import peftree` costs nothing."""
    if name not in _WHERE:
        raise importlib.import_module("peftree.errors").no_name("module 'peftree'", name, __all__)
    value = getattr(importlib.import_module(_WHERE[name]), name)
    if _WHERE[name] == "peftree.adapter":
        importlib.import_module("peftree.store")  # says what save_pretrained of an adapted model writes
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
