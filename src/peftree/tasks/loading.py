"""Loads a model, its config and its tokenizer for a task, from a folder or a hub name; errors are readable."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from peftree.deltas.packed import keep_gradients
from peftree.errors import ConfigError, DataError, did_you_mean, first_line
from peftree.settings import DEFAULT_LENGTH
from peftree.tasks.base import Options
from peftree.tasks.quantized import form_of_files, left_plain, packing, quantization, to_pack
from peftree.trusted import SAFE, cleared, on_hub

_WEIGHTLESS = ContextVar("weightless", default=False)


def is_local(model: str) -> bool:
    """Return True for a folder, or a hub name whose files are here while the hub is not; else the hub has the name.

    Raises:
        ConfigError: a name that looks like a path does not exist, or the hub does not have it.
    """
    if Path(model).expanduser().is_dir():
        return True
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1 or Path(model).exists():
        raise ConfigError(f"model: {model} is not a folder.", "Name the folder with config.json.")
    return not on_hub(model)


def read_config(model: str, changes: Mapping[str, Any], labels: Sequence[str]) -> Any:
    """Return the model's config with `changes`, and with the labels in the model's own order if it knows them."""
    path = str(Path(model).expanduser()) if is_local(model) else model
    try:
        config = cleared(AutoConfig.from_pretrained(path, local_files_only=is_local(model), **SAFE))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"model: {model}: {_first(error)}", "Check the folder or hub name, and its config.") from None
    changed(config, changes)
    if labels:
        known = [config.id2label[i] for i in sorted(config.id2label)] if config.id2label else []
        order = known if set(known) == set(labels) else list(labels)
        config.id2label = dict(enumerate(order))
        config.label2id = {name: i for i, name in enumerate(order)}
    return config


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """Return a model's config with `changes` applied.

    Raises:
        ConfigError: the config has no such field, or refuses the value.
    """
    known = config.to_dict()
    for key, value in changes.items():
        if key not in known:
            what = f"config.{key}: {type(config).__name__} has no such field."
            raise ConfigError(what, did_you_mean(key, known, "It has"))
        own = known[key]
        try:
            if isinstance(own, dict | list) and not isinstance(value, type(own)):
                raise TypeError(f"it is not a {type(own).__name__}")
            setattr(config, key, value)
        except (StrictDataclassError, TypeError, ValueError) as error:
            what = f"config.{key}={value!r} is refused by {type(config).__name__}: {_first(error.__cause__ or error)}"
            raise ConfigError(what, f"Leave it out, or write a value like the model's own, {own!r}.") from None
    return config


def label_order(config: Any) -> list[str]:
    """Return the class names in the order of the model's outputs."""
    return [config.id2label[i] for i in sorted(config.id2label)]


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Inside, `load` builds models on the meta device, enough for what a task makes of rows."""
    token = _WEIGHTLESS.set(True)
    try:
        yield
    finally:
        _WEIGHTLESS.reset(token)


def load(auto: Any, model: str, config: Any, options: Options) -> tuple[nn.Module, list[str]]:
    """Load the weights; return the model and the names of its new tensors, which the run's seed draws."""
    path = str(Path(model).expanduser()) if is_local(model) else model
    packing = {} if _WEIGHTLESS.get() else _quantized(auto, model, config, options)
    try:
        if _WEIGHTLESS.get():
            with torch.device("meta"):
                return (getattr(auto, "from_config", None) or auto._from_config)(config), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            net, info = auto.from_pretrained(
                path, config=config, dtype=getattr(torch, options.dtype, "auto"), use_safetensors=True,
                local_files_only=is_local(model), ignore_mismatched_sizes=True,
                output_loading_info=True, **packing, **SAFE,
            )  # fmt: skip
    except Exception as error:  # whatever a model's code raises becomes one error of ours
        if options.config and not isinstance(error, OSError):  # layers are made of them, with any error of Python's
            fix = f"Leave {_changes(options)} out, or write values that fit the model's other sizes."
        elif isinstance(error, OSError | ValueError | RuntimeError):
            fix = "It must hold safetensors weights."
        else:
            raise
        raise ConfigError(f"model: {model}: {_first(error)}", fix) from None
    for module in net.modules():
        keep_gradients(module)
    return net, sorted({*info["missing_keys"], *_resized(model, config, options, info["mismatched_keys"])})


def _resized(model: str, config: Any, options: Options, found: Iterable[tuple[str, Any, Any]]) -> Iterator[str]:
    """Yield tensors that the files hold for other labels; ConfigError for one that differs from them in another way."""
    for name, old, new in sorted(found):
        if len(old) != len(new) or any(a != b != len(config.id2label or ()) for a, b in zip(old, new, strict=True)):
            what = f"{name} is {list(old)} in its files, but {list(new)} by its config"
            fix = f"Leave {_changes(options)} out." if options.config else "Restore the weights' own config.json."
            raise ConfigError(f"model: {model}: {what}.", fix)
        yield f"{name} {list(new)}"


def _changes(options: Options) -> str:
    return ", ".join(f"config.{key}={value!r}" for key, value in options.config.items())


def _quantized(auto: Any, model: str, config: Any, options: Options) -> dict[str, Any]:
    """Return what quantises the weights while they are read; nothing if the run does not ask for it.

    A config whose files are packed in a form without training passes is changed so that they are unpacked.

    Raises:
        ConfigError: see `form_of_files`; or the model has nothing to quantise in that way.
    """
    form = form_of_files(config, options.quantize)
    if own := packing(config):
        if form == "none":
            vars(config.get_text_config(decoder=True)).pop("quantization_config", None)
            config.quantization_config = own | {"dequantize": True}
        return {}
    if options.quantize == "none":
        return {}
    with torch.device("meta"):
        empty: nn.Module = (getattr(auto, "from_config", None) or auto._from_config)(config)
    if not to_pack(empty, options.quantize):
        what = f"quantize={options.quantize}: {type(empty).__name__} has no linear map that it packs."
        raise ConfigError(what, "Use nf4 or int8, or leave quantize out.")
    dtype = getattr(torch, options.dtype, getattr(config, "dtype", None) or torch.float32)
    return {"quantization_config": quantization(options.quantize, dtype, left_plain(empty))}


def tokenizer(model: str) -> Any:
    """Return the tokenizer of a folder or hub name; ConfigError if there is none."""
    local = is_local(model)
    path = str(Path(model).expanduser()) if local else model
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=local, **SAFE)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model: {model} has no tokenizer: {_first(error)}", "Add tokenizer.json.") from None


def cut_texts(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[list[list[int]], list[int]]:
    """Return at most `length` token ids per text, including special ones, and which texts were longer."""
    if not texts:
        return [], []
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    full = [i for i, row in enumerate(ids) if len(row) == length]
    whole = tokenizer([texts[i] for i in full], verbose=False)["input_ids"] if full else []
    return ids, [i for i, row in zip(full, whole, strict=True) if len(row) > length]


def _first(error: BaseException) -> str:
    return f"{first_line(error)}."


def pad_id(tokenizer: Any) -> int:
    """Return an id to pad with; its value does not matter, because padding is masked by position."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def length(
    model: nn.Module, tokenizer: Any, wanted: int | None, config: Any = None, usual: int = DEFAULT_LENGTH
) -> int:
    """Return the most tokens that a row may have.

    Args:
        model, tokenizer: see above.
        wanted: tokens that are asked for; None: `usual`, or what the model takes if that is less.
        config: of the part of the model that reads text; None: of the model.
        usual: see `wanted`.

    Raises:
        ConfigError: `wanted` is more than the model takes.
        DataError: the tokenizer has tokens for which the model has no embedding.
    """
    config = model.config if config is None else config
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise DataError(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model embeds {rows:,}.",
            "Resize the model's embeddings and train them first, or use the model's own tokenizer.",
        )
    limits = [int(v) for v in (getattr(config, "max_position_embeddings", None),) if v]
    limits += [tokenizer.model_max_length] if tokenizer.model_max_length < 1 << 30 else []
    most = min(limits, default=1 << 30)
    if wanted is not None and wanted > most:
        raise ConfigError(f"max_length={wanted}: the model takes {most} tokens.", "Lower max_length.")
    return wanted or min(usual, most)


def takes(model: nn.Module, name: str) -> bool:
    """Return True if the model's forward has an argument `name`."""
    return name in inspect.signature(model.forward).parameters
