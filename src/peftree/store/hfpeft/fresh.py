"""From a config of PEFT's to a method for a new adapter: no weights file, so the config alone says where it goes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftree import sites as site_tree
from peftree.errors import StoreError
from peftree.files import read_json
from peftree.methods.contract import Method
from peftree.sites.parts import modules_of
from peftree.store.folder import CONFIG, named
from peftree.store.hfpeft import whole
from peftree.store.hfpeft.dialect import Dialect, refuse
from peftree.store.hfpeft.names import matches, saved_paths
from peftree.store.hfpeft.schema import Common, Targeted

STARTS = (None, True, "pissa", "olora")  # of LoRA's tensors, that are the same here
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT trains the head of these tasks, asked or not


def plain(config: Any) -> tuple[dict[str, Any], Path, bool]:
    """Return a config as JSON would hold it, what to call it in errors, and whether it came from a file.

    Args:
        config: a PEFT config or any object with `to_dict`, a mapping, or the path of a config or its folder.

    Raises:
        StoreError: it is none of these.
    """
    if isinstance(config, str | Path):
        path = named(config)
        path = path / CONFIG if path.is_dir() else path
        return read_json(path), path, True
    where = Path(f"the {type(config).__name__}")
    call = getattr(config, "to_dict", None)
    raw = dict(config) if isinstance(config, Mapping) else call() if callable(call) else None
    if not isinstance(raw, dict):
        raise StoreError(f"{where} is not a config.", "Pass a PEFT config, a dict, or the path of a config.")
    try:
        made: dict[str, Any] = json.loads(json.dumps(raw, default=_listed))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{where} holds what JSON cannot: {str(error)[:200]}.", "Pass plain values.") from None
    return made, where, False


def _listed(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__}")


def place(config: Common, model: nn.Module) -> None:
    """Run the patterns of a config that the caller made, and note the modules that they match."""
    targets = config.target_modules if isinstance(config, Targeted) else None
    if not isinstance(config, Targeted) or targets is None or str(targets).lower() == "all-linear":
        return
    if isinstance(targets, list) and not isinstance(config.exclude_modules, str):
        return
    excluded = config.exclude_modules or []
    config._tensors = {
        name: {} for name in modules_of(model) if name and _named(name, targets) and not _named(name, excluded)
    }


def _named(name: str, terms: str | list[str]) -> bool:
    if isinstance(terms, str):
        return re.fullmatch(terms, name) is not None
    return any(matches(name, term) for term in terms)


def complete(
    dialect: Dialect[Any], config: Any, method: Method, model: nn.Module, paths: list[str], where: Path
) -> tuple[Method, bool]:
    """Return the method with any trained modules and biases, and whether the task head is among them."""
    if config.peft_type == "P_TUNING":
        raise refuse(
            where, "a network behind the tokens is not trained here", "Use PROMPT_TUNING, or load a finished one."
        )
    start = getattr(config, "init_lora_weights", None)
    if start not in STARTS:
        raise refuse(where, f"init_lora_weights={start!r} is not supported here", "Leave it at True.")
    head = {s.path for s in site_tree.task_head(model)}
    saved = saved_paths(model, config.modules_to_save or [])
    inside = [n for n, _ in model.named_parameters() if any(n.startswith(f"{p}.") for p in saved)]
    bias = getattr(config, "bias", "none")
    if bias != "none":
        inside += [
            n
            for n, _ in model.named_parameters()
            if n.rpartition(".")[2] == "bias" and n not in inside and (bias == "all" or n.rpartition(".")[0] in paths)
        ]
    with_head = bool(head) and (config.task_type in HEADED or head <= {n.rpartition(".")[0] for n in inside})
    rest = [n for n in inside if not (with_head and n.rpartition(".")[0] in head)]
    return whole.joined(method, whole.parts_for(model, rest), dialect.beside(config, method)), with_head
