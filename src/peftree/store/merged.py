"""Export: an adapter as a Hugging Face PEFT folder, or merged into a complete model folder."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from peftree import adapter as adapters
from peftree.adapter import Adapter
from peftree.compose import evaluating, merged
from peftree.deltas.packed import keep_gradients, stored
from peftree.errors import AdapterError, StoreError
from peftree.files import stage_for, sync_folder
from peftree.store import build, hfpeft
from peftree.store.folder import OPEN, put_in_place, target, write_folder
from peftree.store.plain import save_whole, unpacked

TOLERANCE, HALF = 1e-4, 5e-2


def export(
    adapter: Adapter, folder: str | Path, to: Literal["peft", "merged"] = "peft", quantized: str = "refuse"
) -> Path:
    """Write an adapter for other programs and return the folder's path.

    Args:
        adapter: an adapter on a model; the model is unchanged afterwards.
        folder: created if needed; for `merged` it must be empty or new.
        to: `peft` for PEFT's files; `merged` for a complete model with the adapter folded in, which is reloaded
            and compared before it is put in place.
        quantized: what a merged model is if its base is quantised, see `merge`: with `dequantize` the whole model is
            written with plain weights, with `requantize` it is quantised as it was.

    Raises:
        StoreError: PEFT's format cannot hold it, the folder is in use, or the merged model does not load equal.
        MergeError: it cannot be folded into the weights.
    """
    if to == "peft":
        return write_folder(folder, hfpeft.files(an_adapter(adapter)))
    if to != "merged":
        raise StoreError(f"Cannot export to {to!r}.", "Use to='peft' or to='merged'.")
    return _merged(an_adapter(adapter), folder, quantized)


def an_adapter(given: Adapter) -> Adapter:
    """Return `given`; AdapterError if it is not an adapter, for example the model that holds one."""
    if not isinstance(given, Adapter):
        raise AdapterError(
            f"A {type(given).__name__} is not an adapter.",
            "Pass what peftree.adapt or peftree.load returned, or peftree.adapters(model)['default'].",
        )
    return given


def _merged(adapter: Adapter, folder: str | Path, quantized: str) -> Path:
    """Write the merged model to a sibling folder, load it, compare, and move it into place."""
    model = adapter.model
    if model is None or "save_pretrained" not in dir(model):
        raise StoreError(
            "Only a transformers model can be written as a whole.", "Use to='peft', or peftree.save(adapter, folder)."
        )
    path = target(folder)
    if path.is_dir() and os.listdir(path):
        raise StoreError(f"{path} is not empty.", "Name a new folder for the merged model.")
    stage = stage_for(path)
    try:
        with _alone(adapter):
            wanted = _probe(model)
            with merged(model, quantized):
                plain = unpacked(model) if quantized == "dequantize" else build.bare(model)
                wanted = wanted if quantized == "refuse" else _probe(plain)  # what is quantised rounds activations too
                _write(plain, stage)
                _check(plain, stage, wanted)
        for file in stage.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.chmod(file, 0o644)
        os.chmod(stage, OPEN)
        put_in_place(stage, path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    sync_folder(path.parent)
    return path


@contextlib.contextmanager
def _alone(adapter: Adapter) -> Iterator[None]:
    """Switch on only this adapter, in evaluation mode, then restore the previous state."""
    model = adapter.graft.model
    before = adapters.active(model)
    adapters.switch(model, adapter.name)
    try:
        with evaluating([model]):
            yield
    finally:
        adapters.switch(model, before)


def _write(plain: Any, stage: Path) -> None:
    """Save a model without adapters; if merging separated tied embeddings, the config says so."""
    plain.config = copy.deepcopy(plain.config)
    configs = (plain.config, plain.config.get_text_config())
    if any(getattr(config, "tie_word_embeddings", False) for config in configs) and not _tie(plain):
        for config in configs:
            config.tie_word_embeddings = False
        plain.all_tied_weights_keys = {}
    save_whole(plain, stage)


def _tie(plain: Any) -> bool:
    """Return whether the output embedding is still the input embedding, tying them again if they are equal."""
    try:
        given, made = plain.get_input_embeddings(), plain.get_output_embeddings()
    except NotImplementedError:  # transformers' answer for models without one
        return True
    if given is None or made is None or made.weight is given.weight:
        return True
    if given.weight.shape == made.weight.shape and torch.equal(given.weight, made.weight):
        made._parameters["weight"] = given.weight
        return True
    return False


def _check(plain: Any, stage: Path, wanted: Tensor | None) -> None:
    """Load the folder and compare it with the merged tensors and with the adapted model's output on the probe."""
    own = next(p for p in plain.parameters() if p.is_floating_point())
    loaded = type(plain).from_pretrained(stage, dtype=own.dtype, local_files_only=True).to(own.device).eval()
    for module in loaded.modules():
        keep_gradients(module)  # whose layout has other products
    advice = "Its class cannot hold the merged weights; keep the adapter and load it with peftree.load."
    found = loaded.state_dict()
    for name, tensor in plain.state_dict().items():
        pairs = zip(stored(found[name]), stored(tensor), strict=True) if name in found else ()
        if name not in found or not all(torch.equal(a, b) for a, b in pairs):
            raise StoreError(f"The merged model, loaded again, has a different {name}.", advice)
    output = _probe(loaded)
    if output is None or wanted is None:
        return
    error = float((output.float() - wanted.float()).abs().max())
    allowed = (TOLERANCE if own.dtype in (torch.float32, torch.float64) else HALF) * max(1.0, float(wanted.abs().max()))
    if not error <= allowed:
        raise StoreError(
            f"The merged model, loaded again, differs from the adapted one by {error:.2e} (allowed {allowed:.2e}).",
            advice,
        )


def _probe(model: Any) -> Tensor | None:
    """Return the model's output on a small fixed input; None if its inputs are not token ids or one image."""
    main = getattr(type(model), "main_input_name", "")
    device = next(model.parameters()).device
    inputs: dict[str, Tensor] = {}
    config = model.config
    if main == "input_ids":
        size = int(config.get_text_config().vocab_size)
        inputs["input_ids"] = (torch.arange(8, device=device)[None] * 7 + 3) % size
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    elif main == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (1, int(getattr(config, "num_channels", 3)), config.image_size, config.image_size)
        values = torch.linspace(-1, 1, math.prod(shape), device=device).view(shape)
        inputs["pixel_values"] = values.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    if not inputs or "vision_config" in dir(config):
        return None
    with torch.no_grad():
        return next(v for v in model(**inputs).values() if isinstance(v, Tensor)).cpu()
