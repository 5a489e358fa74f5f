"""The request for a plan, checked before anything is built. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from peftree.catalogue import task_facts
from peftree.errors import ConfigError
from peftree.settings import DEFAULT_LENGTH, DataConfig, RunConfig, checked

Mode = Literal["train", "eval", "generate"]
FILE = "adapter_config.json"
_LARGEST = 1 << 20  # bytes that an adapter_config.json may have
_LEAST = 1_000_000  # a smaller number without a unit lacks one
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _bytes(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


class Feed(BaseModel, frozen=True, extra="forbid"):
    """The largest batch that a run's rows make.

    Attributes:
        rows: rows in it; of: rows that were asked for.
        length: tokens that a row was cut at.
        tensors: each tensor's dtype and its shape without the rows.
        flags: the model's other inputs.
        scored: labels that are scored.
    """

    rows: int
    of: int
    length: int
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    flags: dict[str, bool | int] = {}
    scored: int = 0


class Request(RunConfig):
    """The settings of a run, with the machine that it is planned for and everything else that decides its memory.

    It accepts a run's settings on which memory does not depend, and ignores them.
    """

    data: DataConfig | None = Field(None, description="rows; the plan is for the longest")  # type: ignore[assignment]
    max_length: int | None = Field(None, ge=1, le=1 << 20, description=RunConfig.model_fields["max_length"].description)
    peft: dict[str, Any] = Field(default_factory=dict, description="the content of PEFT's adapter_config.json")
    code: Literal["peft", "peftree"] = Field("peft", description="whose code trains the adapter of a PEFT file")
    labels: int = Field(2, ge=1, le=1_000_000, description="classes of a fresh classifier")
    padded: bool = Field(True, description="rows are padded to one length, so attention takes a mask")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="the attention implementation")
    devices: int = Field(1, ge=1, le=100_000, description="devices that train together")
    shard: Literal["none", "ddp", "fsdp"] = Field(  # type: ignore[assignment]
        "none", description="what devices divide: nothing, rows (ddp), or also the layers of the frozen base (fsdp)"
    )
    mode: Mode = Field("train", description="train, eval (a forward pass), or generate (with its cache)")
    new_tokens: int = Field(128, ge=1, le=10_000_000, description="tokens to generate")
    device: Literal["cpu", "cuda"] = Field("cuda", description="whose allocator the expected figure is for")
    train_batch: Feed | None = Field(None, description="the largest batch of training, from the rows of `data`")
    eval_batch: Feed | None = Field(None, description="the largest batch of scoring, from the rows of `data`")
    memory: Annotated[int, BeforeValidator(_bytes)] = Field(
        0, ge=0, description="memory of one device: bytes, or 24GB; 0: no budget"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_run(cls, value: Any) -> Any:
        """Plan a run's processes as devices that share its rows."""
        if isinstance(value, Mapping) and value.get("processes") not in (None, 1, "1"):
            how = value.get("shard", "none")
            return {"devices": value["processes"], **value, "shard": "ddp" if how == "none" else how}
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.devices > 1 and self.shard == "none":
            raise ValueError(f"devices={self.devices} share nothing: set shard=ddp or shard=fsdp")
        if self.peft and self.code == "peft" and self.activations == "recompute":
            raise ValueError("activations=recompute is not for PEFT's own code: set code=peftree, or another value")
        return self

    @property
    def length(self) -> int:
        """Tokens of a row (of each side, for an encoder-decoder)."""
        return self.max_length or DEFAULT_LENGTH

    @property
    def name(self) -> str:
        """The name of the method."""
        return self.peft["peft_type"].lower() if self.peft else self.method.name

    @property
    def contrastive(self) -> bool:
        """Whether the loss compares the rows of one forward pass, so that several passes are not a larger batch."""
        return self.task is not None and task_facts(self.task).contrastive

    @property
    def left_out(self) -> list[str]:
        """What a plan of it does not count, or was not compared with."""
        notes = []
        if self.precision != "float32" and self.device == "cuda":
            notes.append("what autocast leaves in float32 follows torch's list and was not compared with a device")
        if self.compile:
            notes.append(
                "this is the memory of plain passes: what a compiler fuses or keeps is not known before it runs"
            )
        if self.optimizer.startswith("paged_"):
            notes.append("pages of the optimizer's state can leave the device; all of it is counted")
        return notes

    @property
    def bare(self) -> Self:
        """The same request without what memory does not depend on, so that equal requests are recognised."""
        return self.model_copy(update={n: f.get_default() for n, f in type(self).model_fields.items() if n in _IDLE})


# Settings of a run that its memory does not depend on, as far as a plan goes.
_IDLE = (
    *("data", "adapter", "output", "epochs", "steps", "lr", "weight_decay", "schedule"),
    *("warmup", "max_grad_norm", "chat", "seed", "processes", "threads", "eval_every", "save_every", "keep"),
    *(
        "group_by_length",
        "workers",
        "early_stopping",
        "log_every",
        "report_to",
        "base_score",
        "measure_memory",
        "resume",
        "quiet",
        "memory",
    ),
)


def request(**values: Any) -> Request:
    """Return a checked request; `peft` may be a folder with adapter_config.json, that file, or its content.

    Raises:
        ConfigError: a name is unknown, or a value is out of range; the message says what is possible.
    """
    return one_method(checked(Request, values | {"peft": read_adapter(values.get("peft"))}, "plan"))


def one_method(asked: Request) -> Request:
    """Return the request; ConfigError if it names both an adapter's file and a method or head."""
    if asked.peft and (given := sorted({"method", "head"} & asked.model_fields_set)):
        where = next(filter(None, map(asked.where, given)), "")
        raise ConfigError(
            f"{where}An adapter's file says what its method and head are, and {' and '.join(given)} is set as well.",
            "Leave out head, the method and its fields; in place of a run, name its model.",
        )
    return asked


def read_adapter(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the adapter config of `source`: a folder, its adapter_config.json, the config itself, or nothing.

    Raises:
        ConfigError: there is none, or it names no method.
    """
    if not source:
        return {}
    if isinstance(source, Mapping):
        found: Any = dict(source)
    else:
        path = Path(source).expanduser()
        path = path / FILE if path.is_dir() else path
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise ConfigError(f"{source} has no {FILE} of a usual size.", "Name the folder of a PEFT adapter.")
        try:
            found = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}.", "Save the adapter again.") from None
    if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
        raise ConfigError(f"The adapter config names no peft_type: {str(found)[:60]}.", f"Use PEFT's {FILE}.")
    return found


def parse_bytes(text: str) -> int:
    """Return the bytes that `24GB`, `24GiB` or `800M` means.

    >>> parse_bytes("24GB"), parse_bytes("1.5 GiB")
    (24000000000, 1610612736)

    Raises:
        ConfigError: the text is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise ConfigError(f"'{text}' is not an amount of memory.", "Write it as 24GB, 24GiB or 800MB.")
    number = found[1]
    if number == text.strip() and float(number) < _LEAST:
        what = f"'{text}' has no unit, and {number} bytes do not hold a model."
        raise ConfigError(what, f"Write {number}GB or {number}GiB, or {number}MB.")
    return int(float(number) * _UNITS[found[2]])
