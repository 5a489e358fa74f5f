"""peftree: every branch of parameter-efficient fine-tuning behind one small contract."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftree.adapter import Adapter as Adapter
    from peftree.adapter import active as active
    from peftree.adapter import adapt as adapt
    from peftree.adapter import adapters as adapters
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
    from peftree.store import load as load
    from peftree.store import save as save
    from peftree.train.trainer import AdapterTrainer as AdapterTrainer

__version__ = "0.1.0"

_HOMES = {
    "peftree.adapter": ("Adapter", "active", "adapt", "adapters", "detach", "disabled", "route", "switch"),
    "peftree.compose": ("combine", "merge", "unmerge"),
    "peftree.errors": ("PeftreeError",),
    "peftree.registry": ("get",),
    "peftree.store": ("export", "load", "save"),
    "peftree.train.trainer": ("AdapterTrainer",),
}  # fmt: skip
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import peftree` costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'peftree' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
