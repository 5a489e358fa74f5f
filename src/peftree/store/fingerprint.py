"""Base fingerprint: what an adapter records about its base model, and how a model is compared with that.

It holds the model's class, the essentials of its config, a hash of all parameter names and shapes, and a digest of
every parameter's bits (see `digest.py`), so a change of any value is seen. Two bases are the same if the digests
agree. If their dtypes differ, it is enough that they agree once both are rounded to bfloat16 or float16: the same
checkpoint loaded in another dtype is the same base. Adapters, merging, the device and buffers do not count, nor does a
fresh task head, whose random start is not part of the pretrained model; an adapter carries its own copy.

The weights of a quantised base are compared by values sampled from them, since another device may round one
differently. A base that is quantised in another way, or not at all, can agree no better than it was rounded: it is
accepted, with a warning, if everything that is not quantised is the same and the samples are near.
"""

from __future__ import annotations

import base64
import hashlib
import warnings
from collections.abc import Container, Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from peftree import sites as site_tree
from peftree.adapter import Record
from peftree.deltas.packed import dense, form_of, hollow, is_packed
from peftree.errors import PeftreeWarning, StoreError
from peftree.sites.parts import inside, join, modules_of
from peftree.store.digest import SIZE, digests
from peftree.strict import Strict

TENSORS = 1024  # beyond, tensors are digested in groups
ROUNDED = (torch.bfloat16, torch.float16)
SAMPLES = 8  # values of a packed weight
SAME, NEAR = 0.05, 0.5  # relative distance of the samples of a weight: packed in the same way, or in another
ESSENTIALS = (
    "model_type", "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "num_hidden_layers", "num_layers", "n_layer",
    "n_layers", "num_attention_heads", "num_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "hidden_act", "activation_function", "rope_theta", "rms_norm_eps",
    "layer_norm_eps", "layer_norm_epsilon", "tie_word_embeddings", "image_size", "patch_size",
)  # fmt: skip
Scalar = bool | int | float | str | None


class Fingerprint(Strict):
    """What is recorded about a base model; see the docstring of this module.

    Attributes:
        model: name of its class.
        config: essentials of its config; those of towers have dotted names.
        parameters, tensors: the number of values and tensors.
        shapes: SHA-256 of the names and shapes of all parameters.
        dtype: the dtype of its first parameter.
        digests: base64 of the digests, one for each group of tensors; a group is one tensor unless there are very many.
        quantized: how the base's weights are packed; empty if they are not.
        packed: for each packed weight, base64 of little-endian float32 samples of what it stands for.
    """

    model: Annotated[str, Field(max_length=200)]
    config: dict[str, Scalar]
    parameters: int
    tensors: int
    shapes: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    dtype: Annotated[str, Field(max_length=40)]
    digests: Annotated[str, Field(max_length=1 << 17)]
    quantized: Annotated[str, Field(max_length=40)] = ""
    packed: dict[str, Annotated[str, Field(max_length=64)]] = Field(default_factory=dict, max_length=1 << 16)


def fingerprint(model: nn.Module, *, again: bool = False) -> Fingerprint:
    """Return the fingerprint of the base model, whatever adapters are on it.

    Args:
        model: with or without adapters.
        again: read no weight a second time that was not changed since; see `digests`.

    Raises:
        StoreError: the model is on the meta device and has no values.
    """
    return _kept(model) or _taken(model, ROUNDED, again)


def _kept(model: nn.Module) -> Fingerprint | None:
    """Return the fingerprint that was taken before the base was spread over processes."""
    record = model.__dict__.get("_peftree")
    return record.base if isinstance(record, Record) else None


def _taken(model: nn.Module, rounded: Sequence[torch.dtype], again: bool = False) -> Fingerprint:
    """Return the fingerprint with the digests of the bits as they are and `rounded`."""
    named = _named(model)
    text = "\n".join(f"{name} {list(p.shape)}" for name, p in named)
    packed = {name: (module, p) for name, module, p in _base(model) if is_packed(p)}
    digests = [_digest(group, rounded, packed, again) for group in _groups(named)]
    kinds = {form_of(p) for _, p in packed.values()}
    return Fingerprint(
        quantized=" ".join(sorted(kinds)), packed={name: _sampled(*where) for name, where in packed.items()},
        model=_class_name(model), config=_essentials(model), parameters=sum(p.numel() for _, p in named),
        tensors=len(named), shapes=hashlib.sha256(text.encode()).hexdigest(),
        dtype=str(named[0][1].dtype) if named else "", digests=base64.b64encode(b"".join(digests)).decode(),
    )  # fmt: skip


def difference(saved: Fingerprint, model: nn.Module) -> str:
    """Return how `model` differs from the base in `saved`, as the rest of a sentence, or an empty string."""
    here = _kept(model) or _taken(model, ())
    if saved.model != here.model:
        return f"it was made for a {saved.model[:80]}, but this is a {here.model}"
    for key in sorted(set(saved.config) | set(here.config)):
        was, now = saved.config.get(key), here.config.get(key)
        if was != now:
            return f"its base has {key[:80]} {str(was)[:80]}, this model {now}"
    if saved.shapes != here.shapes:
        return (
            f"its base has {saved.parameters:,} parameters in {saved.tensors:,} tensors, this model "
            f"{here.parameters:,} in {here.tensors:,}, or names or shapes differ"
        )
    return _values(saved, here, _named(model))


Named = list[tuple[str, Tensor]]


def _values(saved: Fingerprint, here: Fingerprint, named: Named) -> str:
    """Compare the digests, group by group, and the samples of what is packed."""
    was, now, groups = _decode(saved.digests), _decode(here.digests), _groups(named)
    whole = SIZE * (1 + len(ROUNDED))
    if len(was) != whole * len(groups):
        return "its record of the base's values has the wrong length"
    if saved.packed.keys() != here.packed.keys():
        now = bytearray(b"".join(_digest(group, (), saved.packed) for group in groups))
    each = len(now) // len(groups)  # with the rounded ones, if it was kept
    for number, group in enumerate(groups):
        record, held = was[number * whole :][:whole], now[number * each :][:each]
        unknown = any(name in here.packed and name not in saved.packed for name, _ in group)
        if unknown or record[:SIZE] == held[:SIZE]:
            continue
        cast = saved.dtype != here.dtype and (held if each == whole else _digest(group, ROUNDED, saved.packed))
        if not cast or all(record[at : at + SIZE] != cast[at : at + SIZE] for at in range(SIZE, whole, SIZE)):
            more = f" (or of one of the {len(group) - 1} tensors after it)" if len(group) > 1 else ""
            return f"the values of {group[0][0]}{more} are not those of its base"
    return _packed_values(saved, here, dict(named))


def _packed_values(saved: Fingerprint, here: Fingerprint, named: dict[str, Tensor]) -> str:
    """Compare what packed weights stand for: nearly equal if packed in the same way, else up to the rounding."""
    most = SAME if saved.quantized == here.quantized else NEAR
    for name, record in saved.packed.items():
        was = torch.frombuffer(_decode(record) or bytearray(4), dtype=torch.float32)
        held = here.packed.get(name)
        now = _sample(named[name]) if held is None else torch.frombuffer(_decode(held), dtype=torch.float32)
        if was.shape != now.shape or not bool((was - now).norm() <= most * max(was.norm(), now.norm())):
            return f"the values of {name} are not those of its base"
    if saved.quantized != here.quantized:
        kinds = [kind or "not quantised" for kind in (saved.quantized, here.quantized)]
        warnings.warn(
            f"The adapter was made on a base that is {kinds[0]}, this one is {kinds[1]}: the weights agree up to the "
            "rounding, and so do the outputs.", PeftreeWarning, stacklevel=2,
        )  # fmt: skip
    return ""


def _decode(text: str) -> bytearray:
    try:
        return bytearray(base64.b64decode(text, validate=True))
    except ValueError:
        raise StoreError("The manifest's record of the base is damaged.", "Fetch the adapter again.") from None


def _class_name(model: nn.Module) -> str:
    record = model.__dict__.get("_peftree")
    names = [c.__name__ for c in type(model).__mro__ if c.__module__ == type(model).__module__]
    adapted = isinstance(record, Record) and names[0].startswith("Adapted")
    return names[1] if adapted and len(names) > 1 else type(model).__name__


def _sampled(module: nn.Module, packed: Tensor) -> str:
    """Return samples of what a packed weight stands for, as base64."""
    values = _sample(dense(module, packed))
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def _sample(p: Tensor) -> Tensor:
    count = min(SAMPLES, p.numel())
    rank = torch.arange(count, device=p.device)
    at = (2 * rank + 1) * p.numel() // max(1, 2 * count)
    return p.detach().reshape(-1)[at].to(torch.float32).cpu()


def _base(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield name, module and value of the base's own parameters, each once, as they were before merging.

    Fresh task heads do not count.
    """
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
                if parameter.is_meta:
                    raise StoreError(f"{join(path, key)} is on the meta device.", "Load the base's weights first.")
                seen.add(id(parameter))
                yield join(path, key), module, parameter


def _named(model: nn.Module) -> Named:
    """Return the base's tensors by name; a packed one has the shape that it stands for, on the meta device."""
    return [(n, hollow(m, p) if is_packed(p) else p) for n, m, p in _base(model)]


def _groups(named: Named) -> list[Named]:
    """Return every tensor alone, or runs of tensors if there are very many."""
    step = -(-len(named) // TENSORS) or 1
    return [named[at : at + step] for at in range(0, len(named), step)]


def _digest(group: Named, rounded: Sequence[torch.dtype], packed: Container[str], again: bool = False) -> bytes:
    """Return the group's digest: of the bits as they are, then of the values rounded to each of `rounded`.

    Tensors that are packed, here or in `packed`, do not count.
    """
    parts = [digests(torch.empty(0) if p.is_meta or name in packed else p, rounded, again) for name, p in group]
    return b"".join(hashlib.sha256(b"".join(column)).digest()[:SIZE] for column in zip(*parts, strict=True))


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
