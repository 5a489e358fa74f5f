"""A run's configuration: typed fields, strict YAML with file:line, `key=value` overrides. Imports no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlencode

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from peftree.catalogue import tasks
from peftree.errors import ConfigError, did_you_mean
from peftree.files import atomic_write
from peftree.strict import SAME, explain, instead, once, read_yaml


def _task(name: str) -> str:
    if name not in tasks():
        raise ValueError(f"there is no task '{name}'. {did_you_mean(name, tasks(), 'Tasks')}")
    return name


class _Known:
    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": list(tasks())}


TaskName = Annotated[str, AfterValidator(_task), _Known()]


HUB = "hub:"  # begins the name of a data set on a hub


def hub_name(split: str, value: Any) -> Any:
    """Return `{hub: org/name, split: .., config: .., rows: 1000}` as one word; `rows` streams the first ones alone."""
    if not isinstance(value, Mapping):
        name, _, more = value.partition("?") if isinstance(value, str) else ("", "", "")
        return f"{name}?split={split}" if name.startswith(HUB) and not more else value
    known = ("hub", "config", "split", "rows")
    if not isinstance(value.get("hub"), str) or set(value) - set(known):
        raise ValueError(f"it names a file or folder, or has the keys {', '.join(known)}; hub is the name, as org/name")
    if not isinstance(rows := value.get("rows", 1), int) or rows < 1:
        raise ValueError(f"rows: {rows!r} is not a number of rows")
    asked = {"split": split} | {k: v for k, v in value.items() if k != "hub"}
    return f"{HUB}{value['hub']}?{urlencode(asked)}"


def _source(split: str) -> Any:
    return BeforeValidator(partial(hub_name, split))


class DataConfig(BaseModel):
    """Where the rows are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    train: Annotated[str, _source("train")] = Field(
        description="training file, folder of images, folder with all splits, or {hub: org/name, split, config, rows}"
    )
    valid: Annotated[str | None, _source("validation")] = Field(
        None, description="validation file; none: hold out a tenth of the training rows"
    )
    test: Annotated[str | None, _source("test")] = Field(
        None, description="test file; none: results use validation rows"
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="the file's column names for text, label, score, prompt, completion, image .."
    )
    skip_empty: bool = Field(False, description="skip rows that lack a text, label, score, prompt or completion")
    share: float = Field(1.0, gt=0, le=1, description="share of the training rows to use, always the same rows")
    label_noise: float = Field(0.0, ge=0, le=1, description="share of the training labels to replace by another label")


class MethodConfig(BaseModel):
    """Which method, and those of its fields that differ from its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field("lora", description="a method or recipe, see `peftree methods`")
    fields: dict[str, Any] = Field(default_factory=dict, description="the method's fields")

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """Read `lora`, `{name: lora, r: 8}` and `{name: lora, fields: {r: 8}}`."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "fields" not in value:
            name = {"name": value["name"]} if "name" in value else {}
            return name | {"fields": {k: v for k, v in value.items() if k != "name"}}
        return value


Quantized = Literal["none", "nf4", "int8", "int8_torchao", "fp8"]
Activations = Literal["exact", "recompute", "checkpoint"]
Watcher = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _several(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class RunConfig(BaseModel):
    """Everything that decides a training run. `None` means that the method, model or data decides."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    model: str = Field(description="folder of a transformers model, or name of a packaged or hub model", min_length=1)
    config: dict[str, Any] = Field(default_factory=dict, description="fields of the model's own config to change")
    data: DataConfig = Field(description="where the rows are")
    task: TaskName | None = Field(None, description="the task; none: inferred from the data's columns")
    method: MethodConfig = Field(MethodConfig(), description="the method and its fields")
    adapter: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="the adapter's name")
    head: bool | None = Field(None, description="train a copy of the task head; none: only if the head is new")
    output: str = Field("runs/default", description="folder for everything that the run writes")
    epochs: float = Field(3.0, gt=0, le=1e6, description="passes over the training rows")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, le=65536, description="rows per forward pass, in each process")
    eval_batch_size: int = Field(32, ge=1, le=65536, description="rows per scoring pass")
    accumulation: int = Field(
        1,
        ge=1,
        le=65536,
        description="forward passes per step; the loss is the mean over all their labelled items",
    )
    lr: float | None = Field(None, gt=0, le=1e3, description="learning rate; none: the method's default")
    optimizer: str = Field(
        "adamw_torch_fused", description="an optimizer of transformers' Trainer, such as adamw_8bit, adafactor or sgd"
    )
    weight_decay: float = Field(0.0, ge=0, le=10, description="the optimizer's weight decay")
    schedule: Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant"] = Field(
        "linear", description="learning rate schedule after the warm-up"
    )
    warmup: float = Field(0.06, ge=0, description="warm-up steps, as a share of all (< 1) or a number")
    max_grad_norm: float = Field(1.0, ge=0, description="norm that gradients are clipped to; 0: no clipping")
    max_length: int | None = Field(
        None,
        ge=4,
        le=1 << 20,
        description="most tokens per row; longer rows are cut, with a note; none: 256, or the model's limit if less",
    )
    packing: bool = Field(
        False, description="join rows of text up to max_length without seeing each other; batch_size counts joined rows"
    )
    group_by_length: bool = Field(False, description="put rows of like length into one batch, which saves padding")
    workers: int = Field(0, ge=0, le=256, description="processes that make batches; 0: the training process")
    image_size: int | None = Field(None, ge=8, le=8192, description="side of the images in pixels; none: the model's")
    generate: int = Field(
        0, ge=0, le=1 << 20, description="rows to complete by greedy decoding for exact match, ROUGE-L, chrF"
    )
    chat: bool = Field(False, description="wrap prompts in the tokenizer's chat template")
    seed: int = Field(0, ge=0, lt=1 << 31, description="seed of head, adapter, data order and dropout")
    processes: int | None = Field(
        None, ge=1, le=1024, description="processes that train together, each on its own rows; none: as many as started"
    )
    shard: Literal["none", "fsdp"] = Field(
        "none", description="what several processes divide: rows alone, or (fsdp) also the layers of the frozen base"
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; none: torch decides")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the base model; auto: its own; adapters stay float32"
    )
    quantize: Quantized = Field(
        "none",
        description="how the base's linear weights are kept while an adapter trains: nf4 (4 bits) and int8 need "
        "bitsandbytes, int8_torchao and fp8 (weights alone) torchao",
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32",
        description="precision of the products in training passes (autocast); adapters stay float32; "
        "fp16 scales the loss and is slow on CPUs",
    )
    chunked_loss: bool = Field(
        True, description="compute a language model's loss without keeping logits, unless something reads them"
    )
    compile: bool = Field(False, description="compile the model of training passes with torch.compile")
    activations: Activations = Field(
        "exact", description="what the backward pass finds: exact keeps what it needs; recompute runs gate and up "
        "maps again; checkpoint runs each layer again (gradient_checkpointing: true says so, too)",
    )  # fmt: skip
    eval_every: int | None = Field(None, ge=0, description="steps between evaluations; none: each epoch; 0: never")
    save_every: int | None = Field(None, ge=0, description="steps between checkpoints; none: each epoch; 0: never")
    keep: int = Field(2, ge=1, description="number of checkpoints to keep")
    early_stopping: int = Field(0, ge=0, description="stop after this many evaluations without a better one; 0: off")
    log_every: int | None = Field(
        None, ge=1, description="steps between two points of the loss curve; none: at most 10, for 20 points or more"
    )
    report_to: Annotated[tuple[Watcher, ...], BeforeValidator(_several)] = Field(
        (), description="trackers that also get the curves, separated by commas"
    )
    base_score: bool = Field(True, description="score the model without the adapter first")
    measure_memory: bool | None = Field(
        None, description="plan and measure the peak, on a CPU by passes at the end; none: in runs of 100 steps or more"
    )
    resume: bool = Field(False, description="continue from the newest complete checkpoint")
    quiet: bool = Field(False, description="print only errors")
    _lines: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Read `data: reviews.csv` as `data: {train: reviews.csv}`."""
        if isinstance(value, Mapping) and isinstance(value.get("data"), str):
            value = {**value, "data": {"train": value["data"]}}
        return once(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.early_stopping and self.eval_every == 0:
            raise ValueError("early_stopping needs evaluations, but eval_every is 0")
        if self.compile and self.activations == "recompute":
            raise ValueError("activations=recompute does nothing in a compiled model: choose exact or checkpoint")
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether each layer runs again in the backward pass."""
        return self.activations == "checkpoint"

    @property
    def defers_logits(self) -> bool:
        """Whether training passes compute no whole logits where that is possible."""
        return self.chunked_loss and not self.compile

    def where(self, key: str) -> str:
        """Return `file:line: ` where `key` (dotted) was set, or an empty string."""
        found = self._lines.get(key)
        return f"{found}: " if found else ""

    def total_steps(self, rows: int) -> int:
        """Return how many optimizer steps a run over `rows` training rows has, if nothing stops it."""
        each = self.batch_size * self.accumulation * (self.processes or 1)
        return self.steps or math.ceil(self.epochs * max(-(-rows // each), 1))

    def resolved(self, fields: Mapping[str, Any], lr: float) -> dict[str, Any]:
        """Return the configuration with the method's `fields` and rate filled in, as plain data."""
        plain = self.model_dump(mode="json")
        return plain | {"lr": lr, "method": {"name": self.method.name, "fields": dict(fields)}}


S = TypeVar("S", bound=RunConfig)
SETTINGS = "resolved.yaml"  # in a run's folder
DEFAULT_LENGTH = 256  # tokens of a row where none are named, or what the model takes
# What settings were called before, or are elsewhere.
RENAMED = {
    "batch": "batch_size", "length": "max_length", "image": "image_size", "checkpointing": "activations",
    "optim": "optimizer", "torch_compile": "compile", "base": "quantize", "fields": "method.FIELD",
    "column": "data.columns.text", "columns": "data.columns",
}  # fmt: skip


def renamed(old: str, kind: type[BaseModel]) -> str:
    """Return the new name of the setting `old` of a kind; empty if it was not renamed."""
    new = RENAMED.get(old, "")
    return new if new.partition(".")[0] in kind.model_fields else ""


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the settings of a run from a YAML file and `key=value` words; see `read_settings`."""
    return read_settings(RunConfig, path, overrides)


def read_settings(kind: type[S], path: str | Path | None = None, words: Sequence[str] = (), **values: Any) -> S:
    """Read a YAML file, apply `key=value` words, and check everything but the method's fields.

    Args:
        kind: the class of a run's settings, or a subclass with more of them.
        path: the file; None: the words hold every setting.
        words: `epochs=5`, `data.test=t.csv`, `method=dora`, `method.r=32`; a key that a run does
            not have, `r=32`, is one of the method's fields.
        values: settings that override the file and the words.

    Raises:
        ConfigError: naming file, line, key, value and the closest known key.
    """
    lines: dict[str, str] = {}
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_yaml(path, lines)
    for text in words:
        _override(kind, tree, text, lines)
    config = checked(kind, tree | values, str(path or "run"), lines)
    config._lines.update(lines)
    return config


def checked(kind: type[S], values: Mapping[str, Any], source: str = "run", lines: Mapping[str, str] | None = None) -> S:
    """Return settings of a kind; ConfigError if a key or value is wrong, naming the new key for an old one."""
    for old in values:
        if new := renamed(old, kind):
            raise ConfigError(f"{(lines or {}).get(old, source)}: {old}: was renamed.", f"Write {new}.")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*explain(error, kind, source, lines)) from None


def run_of(path: str | Path) -> Path | None:
    """Return the folder of a run, given that folder or its adapter's; None for any other path."""
    folder = Path(path).parent if Path(path).name == "adapter" else Path(path)
    return folder if (folder / SETTINGS).is_file() else None


def spoken(first: str, others: Sequence[str], kind: type[BaseModel]) -> tuple[Path | None, list[str], dict[str, str]]:
    """Split the words of a command line into a run file (or None), `key=value` words, and a model named first.

    A run's folder stands for the settings in it.

    Raises:
        ConfigError: the command has no such option; for the name of a setting, the message says how to write it.
    """
    for word in (first, *others):
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            new = renamed(name, kind) or name
            known = new if new.partition(".")[0] in kind.model_fields else "r" if name == "set" else ""
            fix = f"Settings are key=value: {known}=..." if known else "--help lists the options."
            raise ConfigError(f"There is no option {word.partition('=')[0]}.", fix)
    if first.endswith((".yaml", ".yml")):
        return Path(first), list(others), {}
    if run := run_of(first):
        return run / SETTINGS, list(others), {}
    if "=" in first and not Path(first).exists():
        return None, [first, *others], {}
    return None, list(others), {"model": first}


def write_resolved(path: str | Path, resolved: Mapping[str, Any]) -> Path:
    """Write `resolved` (see `RunConfig.resolved`) as YAML that `load_config` reads, atomically."""
    text = yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True)
    return atomic_write(path, "# Every setting of this run, defaults included.\n" + text)


def _override(kind: type[BaseModel], tree: dict[str, Any], text: str, lines: dict[str, str]) -> None:
    """Apply one `key=value` to the tree."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"'{text}' is not an override.", "Write key=value, as in epochs=5 or r=32.")
    value = _value(raw)
    steps = key.split(".")
    instead(tree, key, value)
    if steps[0] not in (*kind.model_fields, SAME):
        _check_stray(kind, key, text)
        steps = ["method", *steps]
    if steps[0] == "method" and len(steps) == 1 and isinstance(value, str):
        # Another method's fields mean nothing to this one.
        old = tree.get("method")
        same = (old if isinstance(old, str) else (old or {}).get("name", "lora")) == value
        tree["method"] = old if same and isinstance(old, dict) else {"name": value}
        if not same:
            for stale in [k for k in lines if k.startswith("method.")]:
                del lines[stale]
    else:
        _put(tree, steps, value)
    lines[".".join(steps)] = f"'{text}'"


def _value(raw: str) -> Any:
    """Return what YAML reads; a colon in bare words (`layers=-4:`, `layers=1:3`) is text, not a mapping or a time."""
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw
    bare = raw.lstrip()[:1] not in ("{", "[", '"', "'")
    return raw.strip() if bare and ":" in raw and not isinstance(value, str) else value


def _check_stray(kind: type[BaseModel], key: str, text: str) -> None:
    """Refuse a key that is plainly a misspelt key of a run, not a method's field."""
    close = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0.85)
    if close:
        raise ConfigError(
            f"'{text}': a run has no key '{key}'.",
            f"Did you mean '{close[0]}'? A method's field of that name is method.{key}.",
        )


def _put(tree: dict[str, Any], steps: Sequence[str], value: Any) -> None:
    for step in steps[:-1]:
        inner = tree.get(step)
        if isinstance(inner, str) and step in ("method", "data"):
            inner = {"name" if step == "method" else "train": inner}
        tree[step] = dict(inner) if isinstance(inner, dict) else {}
        tree = tree[step]
    if "fields" in tree and steps[0] == "method" and len(steps) == 2 and steps[1] != "name":
        tree["fields"] = {**tree["fields"], steps[1]: value}
        return
    tree[steps[-1]] = value
