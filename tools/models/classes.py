"""The classes of transformers' auto mappings, and how each is built small."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from tools.models.shrink import RULES, shrunk
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}
FILL = frozenset({"filled"})
LARGEST = 40_000_000  # parameters of a model that is run


@dataclass(frozen=True)
class Entry:
    """One class of the mappings, with the model type whose config builds it."""

    name: str
    model_type: str
    mappings: tuple[str, ...]


@cache
def entries() -> dict[str, Entry]:
    """Return every class by name, in the order of the mappings."""
    found: dict[str, tuple[str, list[str]]] = {}
    for label, attribute in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, attribute).items():
            for name in (names,) if isinstance(names, str) else names:
                mine = found.setdefault(name, (model_type, []))[1]
                if label not in mine:
                    mine.append(label)
    return {name: Entry(name, kind, tuple(labels)) for name, (kind, labels) in found.items()}


def small_configs(entry: Entry) -> Iterator[tuple[str, Any]]:
    """Yield configs for a class, from all fields made small to few, each with a word on how."""
    kind = configuration_auto.CONFIG_MAPPING[entry.model_type]
    everything = frozenset({*RULES, "image", "lists", "tokens"})
    tries: list[tuple[str, frozenset[str]]] = [("small", frozenset())]
    tries += [("small, unset fields filled", FILL)]
    tries += [(f"small, {group} as they are", frozenset({group})) for group in sorted(everything)]
    tries += [("narrow as it is", everything - {"layers", "vocab", "tokens", "image", "experts"})]
    tries += [("few layers", everything - {"layers"})]
    for label, skip in tries:
        for fresh in (True, False) if len(skip - FILL) != 1 else (True,):
            try:
                yield label, shrunk(kind(), skip - FILL, fresh, bool(skip & FILL))
            except Exception:
                continue
    yield "default", kind()


def construct(entry: Entry, config: Any, device: str) -> nn.Module:
    """Build the class from a config, on `device`, with every parameter and buffer a finite value that is not flat.

    Raises:
        Exception: whatever the class raises.
    """
    torch.manual_seed(0)
    kind = getattr(transformers, entry.name)
    config = _own(kind, copy.deepcopy(config))
    if vars(config).get("pad_token_id") is None:  # classifiers take the last token that is not padding
        config.pad_token_id = 0 if entry.name.endswith("ForSequenceClassification") else None
    if hasattr(config, "num_labels"):
        config.num_labels = 3
    with torch.device(device):
        model: nn.Module = kind(config)
    if device != "meta":
        _awake(model.eval().float())
    return model.eval()


def _own(kind: Any, config: Any) -> Any:
    """Return the part of a composed config that the class takes, as transformers' auto classes do."""
    wanted = getattr(kind, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next((v for v in vars(config).values() if isinstance(v, wanted)), config)


def _awake(model: nn.Module) -> None:
    """Give flat, tiny, huge or unset parameters random values: those that start at zero hide every effect."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            noise = torch.randn(parameter.shape, generator=draw)
            if not parameter.isfinite().all() or parameter.abs().max() > 1e3:
                parameter.copy_(noise * 0.05)
            elif parameter.ndim == 1 or parameter.std() < 1e-4:
                parameter.add_(noise, alpha=0.05)


def size(entry: Entry, config: Any) -> int:
    """Return the number of parameters, counted on the meta device."""
    return sum(p.numel() for p in construct(entry, config, "meta").parameters())
