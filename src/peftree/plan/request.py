"""What a plan is asked for, checked before anything is built. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftree.errors import ConfigError, did_you_mean

Mode = Literal["train", "eval", "generate"]
FILE = "adapter_config.json"
_LARGEST = 1 << 20  # bytes that an adapter_config.json may have
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Request(BaseModel):
    """One setting whose memory is asked for.

    `length` counts tokens (of each side, for an encoder-decoder); `image` pixels of a side. `memory` is the budget of
    one device in bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="a folder with config.json, that file, or a hub name")
    method: str = Field("lora", description="a method of the tree, full or head_only")
    fields: dict[str, Any] = Field(default_factory=dict, description="the method's fields")
    adapter: dict[str, Any] = Field(default_factory=dict, description="the content of PEFT's adapter_config.json")
    code: Literal["peft", "peftree"] = Field("peft", description="whose code trains the adapter of a file")
    task: str = Field("", description="text-classification, generation ...; empty: by the model's class")
    labels: int = Field(2, ge=1, le=1_000_000, description="classes of a fresh classifier")
    batch: int = Field(1, ge=1, le=1_000_000, description="rows of a batch on one device")
    length: int = Field(512, ge=1, le=10_000_000, description="tokens of a row")
    image: int = Field(0, ge=0, le=100_000, description="pixels of an image's side; 0: the model's own")
    padded: bool = Field(True, description="rows are padded to one length, so that attention takes a mask")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the base; auto: its own")
    base: Literal["dense", "int8", "nf4"] = Field("dense", description="how the frozen linear weights are kept")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="the attention implementation")
    checkpointing: bool = Field(False, description="recompute each layer in the backward pass")
    optimizer: Literal["adamw", "adamw_loop", "adamw_foreach", "adamw_8bit", "sgd"] = Field(
        "adamw", description="adamw is torch's fused one, the Trainer's default"
    )
    accumulation: int = Field(1, ge=1, le=100_000, description="batches of one optimizer step")
    devices: int = Field(1, ge=1, le=100_000, description="devices that train together")
    shard: Literal["none", "ddp", "fsdp"] = Field("none", description="what is split: nothing, rows, or weights too")
    mode: Mode = Field("train", description="train, eval (a forward pass), or generate (with its cache)")
    new_tokens: int = Field(128, ge=1, le=10_000_000, description="tokens to generate")
    device: Literal["cpu", "cuda"] = Field("cuda", description="whose allocator the expected figure is for")
    memory: int = Field(0, ge=0, description="bytes of one device; 0: no budget")


def request(**values: Any) -> Request:
    """Return a checked request; `adapter` may be a folder with adapter_config.json, that file, or its content.

    Raises:
        ConfigError: an unknown name, or a value out of range: named, with what is possible.
    """
    for key in values:
        if key not in Request.model_fields:
            raise ConfigError(f"A plan has no setting '{key}'.", did_you_mean(key, Request.model_fields, "Settings"))
    if values.get("adapter"):
        if values.get("method") or values.get("fields"):
            raise ConfigError("An adapter's file says what its method is.", "Leave out the method and its fields.")
        values["adapter"] = read_adapter(values["adapter"])
        values["method"] = values["adapter"]["peft_type"].lower()
    try:
        made = Request(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        about = Request.model_fields[key].description
        raise ConfigError(f"{key}={first['input']!r}: {first['msg']}.", f"It is: {about}.") from None
    if made.devices > 1 and made.shard == "none":
        raise ConfigError(f"devices={made.devices} share nothing.", "Say shard=ddp or shard=fsdp.")
    return made


def read_adapter(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the adapter config that `source` is: a folder, its adapter_config.json, or the config itself.

    Raises:
        ConfigError: there is none, or it names no method.
    """
    if isinstance(source, Mapping):
        found: Any = dict(source)
    else:
        path = Path(source).expanduser()
        path = path / FILE if path.is_dir() else path
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise ConfigError(f"{source} has no {FILE} of usual size.", "Name the folder of a PEFT adapter.")
        try:
            found = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is no JSON: {error}.", "Save the adapter again.") from None
    if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
        raise ConfigError(f"The adapter config names no peft_type: {str(found)[:60]}.", f"Use an {FILE} of PEFT.")
    return found


def parse_bytes(text: str) -> int:
    """Return the bytes that `24GB`, `24GiB` or `800M` means.

    >>> parse_bytes("24GB"), parse_bytes("1.5 GiB")
    (24000000000, 1610612736)

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(f"'{text}' is no amount of memory.", "Write it as 24GB, 24GiB or 800MB.")
    return int(float(found[1]) * _UNITS[found[2]])
