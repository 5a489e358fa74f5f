"""Compose: fold adapters into the weights and back, and make one adapter from several."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftree import registry
from peftree.adapter import Adapter, active, adapt, detach, known, record_of, switch
from peftree.deltas import Delta, FusedOutput, FusedWeight, Reweight, filled
from peftree.deltas.packed import dense, form_of, is_packed, packed_again
from peftree.deltas.verbs import finite
from peftree.errors import AdapterError, MergeError, PeftreeWarning
from peftree.graft.weights import effective
from peftree.methods.contract import Fusion, Method, Recipe

PACKINGS = ("refuse", "dequantize", "requantize")
Change = tuple[str, nn.Module, str, Tensor | None]  # path, module, name of the parameter, its new value
Fill = Callable[[Delta, list[Delta], list[float]], None]


def merge(model: nn.Module, quantized: str = "refuse") -> float:
    """Fold the active adapters into the weights; the frozen tensors are set aside for `unmerge`.

    Args:
        quantized: what becomes of changed weights that a quantised base keeps in few bits: none is changed (an error),
            they stay unpacked, as exact as the adapter was, or they are packed again.

    Returns:
        The largest error that packing again made in a weight, as a share of what the adapter changed there (Frobenius
        norms): at 1 the rounding is as large as the change. A warning says it too. 0 if nothing was packed again.

    Raises:
        MergeError: an active delta cannot be folded, or a weight is quantised; nothing is changed then.
    """
    check_packing(quantized)
    record = record_of(model)
    graft = record.graft
    names = graft.shared.now.active
    if record.merged:
        raise MergeError(f"{', '.join(record.merged)} is already merged.", "Call peftree.unmerge(model) first.")
    if graft.shared.open:
        raise MergeError("Rows are being routed, or adapters are disabled.", "Leave the `with` block first.")
    bad = sorted({type(d).__name__ for n in names for *_, d in graft.by[n] if not isinstance(d, Reweight)})
    if bad or not names:
        what = f"{', '.join(names)}: {', '.join(bad)} cannot be folded into weights." if bad else "No adapter is on."
        raise MergeError(what, "`peftree methods` shows which methods merge; keep the others as adapters.")
    graft.check(names)
    changes, error = _changes(model, names, quantized)
    for path, module, key, value in changes:
        record.originals[path, key] = module._parameters.get(key)
        kept = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
        module._parameters[key] = value if is_packed(value) else kept  # type: ignore[assignment]
    record.merged = names
    graft.shared.switch(())
    if error:
        what = f"Packing the merged weights again changed one by {error:.1%} of what the adapter changes there."
        warnings.warn(what, PeftreeWarning, stacklevel=2)
    return error


def check_packing(quantized: str) -> None:
    """Raise MergeError if a word does not say what becomes of a quantised weight."""
    if quantized not in PACKINGS:
        raise MergeError(f"quantized={quantized!r} is unknown.", f"Use one of {', '.join(PACKINGS)}.")


def _changes(model: nn.Module, names: tuple[str, ...], quantized: str) -> tuple[list[Change], float]:
    """Return what the adapters `names` make of the weights, and the largest error of packing one again."""
    graft = record_of(model).graft
    changes: list[Change] = []
    errors, config = [0.0], getattr(getattr(model, "config", None), "quantization_config", None)
    with torch.no_grad(), evaluating(d for n in names for *_, d in graft.by[n]):
        inner = [m for n in names for *_, d in graft.by[n] for m in d.modules()]
        held = _storages([*inner, *(module for _, module, _ in graft.hubs())])
        for path, module, hub in graft.hubs():
            program = hub.program(names)
            new = effective(module, program) if program.reweights else {}
            for key, value in new.items():
                old = module._parameters.get(key)
                if value is old:
                    continue
                if value is not None and not finite([value]):
                    what = f"Merging makes {path}.{key} non-finite."
                    raise MergeError(what, "The adapter is damaged: load or retrain it.")
                if old is not None and value is not None and is_packed(old):
                    value, error = _settled(f"{path}.{key}", module, old, value, quantized, config)
                    errors.append(error)
                elif value is not None and not _is_new(value, held):
                    value = value.detach().clone()
                changes.append((path, module, key, value))
    return changes, max(errors)


def _storages(modules: Iterable[nn.Module]) -> set[int]:
    """Return the addresses of the tensors that these modules themselves hold."""
    values = (v for m in modules for group in (m._parameters, m._buffers, vars(m)) for v in group.values())
    plain = (v for v in values if isinstance(v, Tensor) and type(v) in (Tensor, nn.Parameter))
    return {v.untyped_storage().data_ptr() for v in plain}


def _is_new(value: Tensor, held: set[int]) -> bool:
    """Return whether nothing in `held` has the memory of `value`, which a delta made of a frozen weight."""
    whole = type(value) is Tensor and value._base is None and value.is_contiguous()
    return whole and value.untyped_storage().data_ptr() not in held


def _settled(
    name: str, module: nn.Module, old: Tensor, value: Tensor, quantized: str, config: Any
) -> tuple[Tensor, float]:
    """Return the new value of a packed weight as it shall be kept, and the error of that."""
    if quantized == "refuse":
        raise MergeError(
            f"{name} is quantised ({form_of(old)}), so a merged weight is either larger or rounded again.",
            "Pass quantized='dequantize' to keep it unpacked, or quantized='requantize' to pack it and get the error "
            "(peftree merge --quantized ...).",
        )
    if quantized == "dequantize":
        return value, 0.0
    before = dense(module, old).float()
    new = packed_again(module, old, value.to(before.dtype), config)
    return new, _share(dense(module, new).float() - value.float(), value.float() - before)


def _share(error: Tensor, change: Tensor) -> float:
    """Return the norm of an error as a share of that of a change; infinite if only the change is zero."""
    size, of = float(error.norm()), float(change.norm())
    return size / of if of else math.inf if size else 0.0


@contextlib.contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put `modules` and all below them in evaluation mode inside, so that what is folded is what inference computes."""
    training = [m for each in modules for m in each.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unmerge(model: nn.Module) -> None:
    """Put the frozen tensors back, the very same objects, and switch the merged adapters on again."""
    record = record_of(model)
    if not record.merged:
        raise MergeError("Nothing is merged.", "Call peftree.merge(model) first.")
    for (path, key), original in record.originals.items():
        module = model.get_submodule(path)
        now = module._parameters[key]
        if original is not None and now is not None:  # the model may have been moved while it was merged
            if not is_packed(original):
                original.data = original.data.to(now)
            elif original.device != now.device:
                original = original.to(now.device)  # type: ignore[assignment]
        module._parameters[key] = original
    names, record.originals, record.merged = record.merged, {}, ()
    record.turn_on(names)


@contextlib.contextmanager
def merged(model: nn.Module, quantized: str = "refuse") -> Iterator[None]:
    """Inside, the active adapters are folded into the weights; MergeError as for `merge`."""
    merge(model, quantized)
    try:
        yield
    finally:
        unmerge(model)


def combine(model: nn.Module, weights: Mapping[str, float], *, name: str, how: str = "effects") -> Adapter:
    """Make a new adapter from a weighted sum of others and switch it on.

    Args:
        weights: a finite factor for each adapter name.
        how: `effects`: `y + sum w_i (y_i - y)` at every site, exact for any ranks of weight-changing methods and
            the sum of separate effects for branches; `weights`: the weighted sum of the tensors themselves
            (AdapterSoup), for adapters of one method with equal fields.

    Raises:
        AdapterError, MethodError: the adapters do not fit together; nothing is changed then.
    """
    record = record_of(model)
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError("No adapter is named.", "Pass factors by name, {'a': 0.5, 'b': 0.5}.")
    members = [known(record, n) for n in weights]
    bad = [f"{n}={w!r}" for n, w in weights.items() if type(w) not in (int, float) or not math.isfinite(w)]
    if bad:
        raise AdapterError(f"{', '.join(bad)} is not a factor.", "Pass finite numbers.")
    if how not in ("effects", "weights"):
        raise AdapterError(f"how={how!r} is unknown.", "Use 'effects' or 'weights'.")
    if len({tuple((k, s) for k, s, _ in m.entries) for m in members}) != 1:
        raise AdapterError(
            "The adapters sit at different places.",
            "Combine adapters with equal sites, or stack them.",
        )
    single = len(members) == 1 and next(iter(weights.values())) == 1.0
    if how == "weights" or single:
        return _soup(model, members, list(weights.values()), name)
    if any(isinstance(m.method, Recipe) or len(m.method.parts()) > 1 for m in members):
        raise AdapterError("The effects of an adapter with several parts cannot be summed.", "Use how='weights'.")
    first = members[0].method
    fusion = Fusion(
        sites=first.sites, layers=first.layers,
        members=[m.method for m in members], weights=[float(w) for w in weights.values()],
    )  # fmt: skip
    if members[0].head and sum(weights.values()) == 0:
        raise AdapterError("The factors sum to 0, so the task heads have no average.", "Choose other factors.")
    return _make(model, fusion, members, list(weights.values()), name, _fill)


def _make(
    model: nn.Module, method: Method, members: list[Adapter], weights: list[float], name: str, fill: Fill
) -> Adapter:
    """Adapt `model` and fill every delta from the members' by `fill`; an error leaves nothing behind."""
    before = active(model)
    with filled():
        made = adapt(model, method, name=name, head=members[0].head, seed=members[0].seed)
    try:
        with torch.no_grad():
            if fill is _average and made.state().keys() != members[0].state().keys():
                made.finish()
            for key, delta in made.deltas.items():
                fill(delta, [m.deltas[key] for m in members], weights)
    except (KeyError, RuntimeError) as error:
        detach(model, name)
        switch(model, before)
        names = ", ".join(m.name for m in members)
        raise AdapterError(
            f"{names} do not hold the tensors that their method makes here: {error}.",
            "Combine before finish(), or finish all of them and use how='weights'.",
        ) from error
    return made


def _fill(delta: Delta, sources: list[Delta], weights: list[float]) -> None:
    """Copy the members' tensors into a fused delta; a task head is averaged."""
    if isinstance(delta, FusedWeight | FusedOutput):
        for target, source in zip(delta.inner, sources, strict=True):
            target.load_state_dict(source.state_dict())
        return
    _average(delta, sources, [w / sum(weights) for w in weights])


def _average(delta: Delta, sources: list[Delta], weights: list[float]) -> None:
    """Set `delta` to the weighted sum of the tensors; one source at weight 1.0 is copied bit for bit."""
    states = [s.state_dict() for s in sources]
    for key, tensor in delta.state_dict().items():
        if len(states) == 1 and weights[0] == 1.0:
            tensor.copy_(states[0][key])
        elif tensor.is_floating_point():
            tensor.copy_(sum(w * s[key] for w, s in zip(weights, states, strict=True)))
        elif all(torch.equal(s[key], states[0][key]) for s in states):
            tensor.copy_(states[0][key])
        else:
            raise AdapterError(
                f"The adapters differ in '{key}', which selects what is trained and has no mean.", "Use how='effects'."
            )


def _soup(model: nn.Module, members: list[Adapter], weights: list[float], name: str) -> Adapter:
    first = members[0]
    if any(registry.spec(m.method) != registry.spec(first.method) for m in members):
        raise AdapterError("The adapters' methods or fields differ.", "Use how='effects'.")
    return _make(model, first.method, members, weights, name, _average)
