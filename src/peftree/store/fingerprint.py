"""Base fingerprint: what an adapter remembers of the base model it was made for, and how a model is compared with it.

It holds the model's class, the essentials of its config, a hash of all parameter names and shapes, and sampled values
of the weights: up to eight per tensor at fixed strides, as float32. Two bases are the same if the samples agree to the
bit; if their dtypes differ, also if they agree to the bit once both are rounded to bfloat16 or to float16, for the same
checkpoint loaded in another dtype is the same base. Adapters, merging, the device and buffers do not count, nor does a
fresh task head, whose random start is not part of the pretrained model; an adapter carries its own copy.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from peftree import sites as site_tree
from peftree.adapter import Record
from peftree.errors import StoreError
from peftree.sites.parts import inside, join, modules_of

PER_TENSOR, TENSORS = 8, 1024
ESSENTIALS = (
    "model_type", "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "num_hidden_layers", "num_layers", "n_layer",
    "n_layers", "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "hidden_act", "activation_function", "rope_theta", "rms_norm_eps",
    "layer_norm_eps", "layer_norm_epsilon", "tie_word_embeddings", "image_size", "patch_size",
)  # fmt: skip
Scalar = bool | int | float | str | None


class Fingerprint(BaseModel):
    """What is remembered of a base model; see the head of this file.

    Attributes:
        model: name of its class.
        config: essentials of its config, those of towers with a dotted name.
        parameters, tensors: how many values and tensors it has.
        shapes: SHA-256 of every parameter's name and shape.
        dtype: of its first parameter.
        samples: base64 of little-endian float32 values, tensor by tensor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: Annotated[str, Field(max_length=200)]
    config: dict[str, Scalar]
    parameters: int
    tensors: int
    shapes: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    dtype: Annotated[str, Field(max_length=40)]
    samples: Annotated[str, Field(max_length=1 << 17)]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of the base model under whatever adapters are on it.

    Raises:
        StoreError: the model is on the meta device and has no values.
    """
    named = list(_base(model))
    text = "\n".join(f"{name} {list(p.shape)}" for name, p in named)
    samples = np.concatenate([_sample(name, p) for name, p in _chosen(named)] or [np.empty(0, np.float32)])
    return Fingerprint(
        model=_class_name(model),
        config=_essentials(model),
        parameters=sum(p.numel() for _, p in named),
        tensors=len(named),
        shapes=hashlib.sha256(text.encode()).hexdigest(),
        dtype=str(named[0][1].dtype) if named else "",
        samples=base64.b64encode(samples.astype("<f4").tobytes()).decode(),
    )


def difference(saved: Fingerprint, model: nn.Module) -> str:
    """Return how `model` differs from the base that `saved` remembers, as the rest of a sentence, or an empty text."""
    here = fingerprint(model)
    if saved.model != here.model:
        return f"it was made for a {saved.model[:80]}, this is a {here.model}"
    for key in sorted(set(saved.config) | set(here.config)):
        was, now = saved.config.get(key), here.config.get(key)
        if was != now:
            return f"its base has {key[:80]} {str(was)[:80]}, this model {now}"
    if saved.shapes != here.shapes:
        return (
            f"its base has {saved.parameters:,} parameters in {saved.tensors:,} tensors, this model "
            f"{here.parameters:,} in {here.tensors:,}, or names or shapes differ"
        )
    return _values(saved, here, model)


def _values(saved: Fingerprint, here: Fingerprint, model: nn.Module) -> str:
    """Compare the samples, tensor by tensor."""
    if saved.samples == here.samples:
        return ""
    was, now = _decode(saved.samples), _decode(here.samples)
    if len(was) != len(now):
        return "its record of the base's values has another length"
    at = 0
    for name, p in _chosen(list(_base(model))):
        part = slice(at, at + min(PER_TENSOR, p.numel()))
        at = part.stop
        if not _same(was[part], now[part], cast=saved.dtype != here.dtype):
            return f"the values of {name} are not those of its base"
    return ""


def _decode(text: str) -> Tensor:
    try:
        raw = bytearray(base64.b64decode(text, validate=True))
        return torch.frombuffer(raw, dtype=torch.float32) if raw else torch.empty(0)
    except ValueError:
        raise StoreError("The manifest's record of the base is damaged.", "Fetch the adapter again.") from None


def _same(was: Tensor, now: Tensor, cast: bool) -> bool:
    def equal(dtype: torch.dtype) -> bool:
        return torch.equal(was.to(dtype), now.to(dtype))

    return equal(torch.float32) or (cast and (equal(torch.bfloat16) or equal(torch.float16)))


def _class_name(model: nn.Module) -> str:
    record = model.__dict__.get("_peftree")
    names = [c.__name__ for c in type(model).__mro__ if c.__module__ == type(model).__module__]
    adapted = isinstance(record, Record) and names[0].startswith("Adapted")
    return names[1] if adapted and len(names) > 1 else type(model).__name__


def _base(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the base's own parameters, each once, as they were before merging; fresh task heads are left out."""
    record = model.__dict__.get("_peftree")
    originals = record.originals if isinstance(record, Record) else {}
    heads = [site.path for site in site_tree.task_head(model)]
    seen: set[int] = set()
    for path, module in modules_of(model).items():
        if any(path == head or inside(path, head) for head in heads):
            continue
        for key, now in module._parameters.items():
            parameter = originals.get((path, key), now)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield join(path, key), parameter.detach()


def _chosen(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Return every tensor, or an even choice of them where there are very many."""
    step = -(-len(named) // TENSORS) or 1
    return list(itertools.islice(named, 0, None, step))


def _sample(name: str, p: Tensor) -> Any:
    if p.is_meta:
        raise StoreError(f"The base's {name} is on the meta device.", "Load the base model's weights first.")
    count = min(PER_TENSOR, p.numel())
    rank = torch.arange(count, device=p.device)
    at = (2 * rank + 1) * p.numel() // max(1, 2 * count)
    flat = p.reshape(-1) if p.is_contiguous() else p.contiguous().view(-1)
    return flat[at].to(torch.float32).cpu().numpy()


def _essentials(model: nn.Module) -> dict[str, Scalar]:
    config = model.__dict__.get("config")
    if config is None:
        return {}
    found: dict[str, Scalar] = {}
    for prefix, values in _tables(config.to_dict()):
        for key in ESSENTIALS:
            value = values.get(key)
            if isinstance(value, bool | int | float | str):
                found[prefix + key] = value
    return found


def _tables(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", values
    for key, value in values.items():
        if isinstance(value, dict) and (key.endswith("config") or key == "rope_parameters"):
            yield f"{key}.", value
