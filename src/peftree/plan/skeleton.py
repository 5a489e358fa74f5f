"""A model without weights, built on the meta device from its config alone, with all of its layers or a few."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftree.catalogue import task_facts
from peftree.errors import ConfigError, first_line
from peftree.resolver import located
from peftree.tasks import diffusion  # noqa: F401  (makes its model known to transformers' auto classes)
from peftree.trusted import SAFE, cleared, on_hub

# How configs call their number of layers; the first of a row that a config has is the one that counts.
_DEPTHS = (
    ("encoder_layers", "num_layers", "num_hidden_layers", "n_layer", "n_layers"),
    ("decoder_layers", "num_decoder_layers"),
)


@dataclass(frozen=True)
class Depth:
    """One stack's number of layers in a config.

    Attributes:
        part: the sub-config's name, empty for the config itself.
        key: the attribute.
        count: the number of layers.
        period: the number of layers after which their kinds repeat.
    """

    part: str
    key: str
    count: int
    period: int


def read_config(source: str) -> Any:
    """Return the config that `source` names: a folder, its config.json, a packaged model, or a hub name.

    Raises:
        ConfigError: there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    source = located(source)
    path = Path(source).expanduser()
    path = path.parent if path.name == "config.json" and path.is_file() else path
    local = path.is_dir() or source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") != 1
    if local and not (path / "config.json").is_file():
        raise ConfigError(
            f"{source} has no config.json.",
            "Name a model folder, a packaged model (`peftree models`), or a hub name such as org/model.",
        )
    local = local or not on_hub(source)
    try:
        config = cleared(AutoConfig.from_pretrained(str(path), local_files_only=local, **SAFE))
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0  # which one it is does not matter to memory
        return config
    except Exception as error:  # whatever a config or a model's code raises becomes one error of ours
        raise _unbuildable(source, error) from error


def bare_class(config: Any) -> Any:
    """Return the class that a config names, or the plain model of its type if it names none."""
    import transformers

    found = getattr(transformers, (config.architectures or [""])[0], None)
    return found or transformers.AutoModel._model_mapping[type(config)]


def model_class(config: Any, task: str | None) -> Any:
    """Return the class to build: the task's, else the config's own; a bare encoder gets a classifier."""
    import transformers

    name = (config.architectures or [""])[0]
    own = getattr(transformers, name, None)
    if not task:
        bare = name.endswith(("Model", "ForMaskedLM", "ForPreTraining")) and not name.endswith("LMHeadModel")
        if own is not None and not bare:
            return own
        kinds = ["AutoModelForImageClassification"] if getattr(config, "num_channels", None) else []
        kinds += ["AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForSequenceClassification"]
        for kind in kinds:
            auto = getattr(transformers, kind)
            if type(config) in auto._model_mapping:
                return auto._model_mapping[type(config)]
        return own or transformers.AutoModel._model_mapping[type(config)]
    known = task_facts(task)
    auto = getattr(transformers, (config.is_encoder_decoder and known.auto_pair) or known.auto)
    if type(config) not in auto._model_mapping:
        raise ConfigError(f"{type(config).__name__} has no model for {task}.", "Choose another task, or none.")
    return auto._model_mapping[type(config)]


def build(config: Any, kind: Any, dtype: torch.dtype | None = None, attention: str | None = None) -> nn.Module:
    """Return the model of `config` on the meta device: shapes without values.

    Raises:
        ConfigError: the class cannot be built from it.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
            more |= {"attn_implementation": attention} if attention else {}
            model: nn.Module = kind._from_config(copy.deepcopy(config), **more)
    except Exception as error:  # whatever a config or a model's code raises becomes one error of ours
        raise _unbuildable(type(config).__name__, error) from error
    return model


def depths(config: Any) -> list[Depth]:
    """Return the stacks of layers that a config counts."""
    found = []
    for part in ("", *getattr(config, "sub_configs", {})):
        own = getattr(config, part, None) if part else config
        if own is None:
            continue
        known = set(own.to_dict())
        for keys in _DEPTHS:
            key = next((k for k in keys if k in known), None)
            count = getattr(own, key, None) if key else None
            if isinstance(count, int) and count > 0:
                found.append(Depth(part, str(key), count, _period(getattr(own, "layer_types", None) or [])))
    return found


def cut(config: Any, counts: dict[Depth, int]) -> Any:
    """Return a copy of `config` with fewer layers; lists with an entry per layer are cut to match."""
    new = copy.deepcopy(config)
    for depth, count in counts.items():
        own = getattr(new, depth.part) if depth.part else new
        for key, value in own.to_dict().items():
            if isinstance(value, list) and len(value) == depth.count and depth.count > 1:
                setattr(own, key, value[:count])
        setattr(own, depth.key, count)
        if depth.key != "num_hidden_layers" and getattr(own, "num_hidden_layers", None) == depth.count:
            own.num_hidden_layers = count
    return new


def _period(kinds: list[str]) -> int:
    n = len(kinds)
    return next((p for p in range(1, n) if all(kinds[i] == kinds[i - p] for i in range(p, n))), max(n, 1))


def _unbuildable(what: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{what} cannot be built from its config: {first_line(error)}.",
        "Check the folder or name; custom model code is not run.",
    )
