"""A run's configuration: typed fields, strict YAML with file:line, `key=value` overrides. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from peftree.errors import ConfigError, did_you_mean
from peftree.files import atomic_write
from peftree.strict import read_yaml
from peftree.train.facts import TaskName


class DataConfig(BaseModel):
    """Where the rows are."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    train: str = Field(description="training file, folder of images, or folder with all splits")
    valid: str | None = Field(None, description="validation file; none: a tenth is held out")
    test: str | None = Field(None, description="test file; none: results are on validation rows")
    columns: dict[str, str] = Field(
        default_factory=dict, description="the file's names of text, label, score, prompt, completion"
    )
    share: float = Field(1.0, gt=0, le=1, description="share of the training rows to use, the same rows for a share")
    label_noise: float = Field(0.0, ge=0, le=1, description="share of the training labels replaced by another label")


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


class RunConfig(BaseModel):
    """Everything that decides a training run. `None` means: chosen by the method, model or data."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    model: str = Field(description="folder of a transformers model, or a packaged or a hub name", min_length=1)
    config: dict[str, Any] = Field(default_factory=dict, description="fields of the model's own config to change")
    data: DataConfig = Field(description="where the rows are")
    task: TaskName | None = Field(None, description="none: told from the data's columns")
    method: MethodConfig = Field(MethodConfig(), description="the method and its fields")
    adapter: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="the adapter's name")
    head: bool | None = Field(None, description="train a copy of the task head; none: if it is new")
    output: str = Field("runs/default", description="folder of everything the run writes")
    epochs: float = Field(3.0, gt=0, le=1e6, description="passes over the training rows")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch_size: int = Field(16, ge=1, le=65536, description="rows of one forward pass")
    eval_batch_size: int = Field(32, ge=1, le=65536, description="rows of one scoring pass")
    accumulation: int = Field(1, ge=1, le=65536, description="forward passes of one step")
    lr: float | None = Field(None, gt=0, le=1e3, description="none: the method's own default")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's decay")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="course of the learning rate after the warm-up"
    )
    warmup: float = Field(0.06, ge=0, description="share of the steps (< 1) or their number")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to it; 0: not")
    max_length: int | None = Field(
        None, ge=4, le=1 << 20, description="tokens of a row; none: 256 or what the model takes"
    )
    image_size: int | None = Field(None, ge=8, le=8192, description="side in pixels; none: the model's")
    generate: int = Field(
        0, ge=0, le=1 << 20, description="rows to complete by greedy decoding for exact match, ROUGE-L, chrF"
    )
    chat: bool = Field(False, description="put prompts into the tokenizer's chat template")
    seed: int = Field(0, ge=0, lt=1 << 31, description="of head, adapter, data order and dropout")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads; none: torch decides")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the base model; adapters stay float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations, compute them again: less memory, more time"
    )
    eval_every: int | None = Field(None, ge=0, description="steps; none: each epoch; 0: never")
    save_every: int | None = Field(None, ge=0, description="steps; none: each epoch; 0: never")
    keep: int = Field(2, ge=1, description="how many checkpoints stay")
    early_stopping: int = Field(0, ge=0, description="stop after so many evaluations without a better one; 0: off")
    log_every: int = Field(10, ge=1, description="steps between two points of the loss curve")
    base_score: bool = Field(True, description="score the model without the adapter first")
    resume: bool = Field(False, description="go on from the newest complete checkpoint")
    quiet: bool = Field(False, description="print nothing but errors")
    _lines: dict[str, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Read `data: reviews.csv` as `data: {train: reviews.csv}`."""
        if isinstance(value, Mapping) and isinstance(value.get("data"), str):
            return {**value, "data": {"train": value["data"]}}
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.early_stopping and self.eval_every == 0:
            raise ValueError("early_stopping needs evaluations, but eval_every is 0")
        return self

    def where(self, key: str) -> str:
        """Return `file:line: ` where `key` (dotted) was set, or an empty string."""
        found = self._lines.get(key)
        return f"{found}: " if found else ""

    def resolved(self, fields: Mapping[str, Any], lr: float) -> dict[str, Any]:
        """Return the configuration with the method's `fields` and rate filled in, as plain data."""
        plain = self.model_dump(mode="json")
        return plain | {"lr": lr, "method": {"name": self.method.name, "fields": dict(fields)}}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key=value` overrides, and check everything but the method's fields.

    Args:
        path: the file; None: the overrides say it all.
        overrides: `epochs=5`, `data.test=t.csv`, `method=dora`, `method.r=32`; a key that a run does
            not have, `r=32`, is one of the method's fields.

    Raises:
        ConfigError: naming file, line, key, value and the closest known key.
    """
    lines: dict[str, str] = {}
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_yaml(path, lines)
    for text in overrides:
        _override(tree, text, lines)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*_explain(error, lines, str(path or "run"))) from None
    config._lines.update(lines)
    return config


def write_resolved(path: str | Path, resolved: Mapping[str, Any]) -> Path:
    """Write `resolved` (see `RunConfig.resolved`) as YAML that `load_config` reads, atomically."""
    text = yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True)
    return atomic_write(path, "# Every setting of this run, defaults included.\n" + text)


def _override(tree: dict[str, Any], text: str, lines: dict[str, str]) -> None:
    """Apply one `key=value` to the tree."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"'{text}' is no override.", "Write key=value, as in epochs=5 or r=32.")
    value = _value(raw)
    steps = key.split(".")
    if steps[0] not in RunConfig.model_fields:
        _check_stray(key, text)
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
    """Return what YAML reads; a colon in bare words (`layers=-4:`, `layers=1:3`) is text, no mapping and no time."""
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw
    bare = raw.lstrip()[:1] not in ("{", "[", '"', "'")
    return raw.strip() if bare and ":" in raw and not isinstance(value, str) else value


def _check_stray(key: str, text: str) -> None:
    """Refuse a key that is no method's field but plainly a misspelt key of a run."""
    close = difflib.get_close_matches(key, RunConfig.model_fields, n=1, cutoff=0.85)
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


def _explain(error: ValidationError, lines: Mapping[str, str], source: str) -> tuple[str, str]:
    """Turn pydantic's first complaint into what is wrong and what to do; an unknown key may be a missing one."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = [str(p) for p in first["loc"]]
    key = ".".join(loc)
    where = lines.get(key) or next(
        (lines[k] for k in (".".join(loc[:n]) for n in range(len(loc), 0, -1)) if k in lines), source
    )
    model = _model_at(loc[:-1])
    if first["type"] == "extra_forbidden":
        return f"{where}: {key}: is no key here.", did_you_mean(loc[-1], model.model_fields, "Keys")
    if first["type"] == "missing":
        about = model.model_fields[loc[-1]].description
        return f"{where}: {key}: is missing ({about}).", f"Add {key}: ..."
    if not loc:
        return f"{source}: {first['msg'].removeprefix('Value error, ')}.", "Change one of them."
    info = _model_at(loc[:-1]).model_fields.get(loc[-1]) or RunConfig.model_fields.get(loc[0])
    about = f"{info.description}." if info is not None and info.description else ""
    return f"{where}: {key}: {first['input']!r}: {first['msg']}.", f"{loc[0]}: {about}"


def _model_at(loc: Iterable[str]) -> type[BaseModel]:
    models: dict[str, type[BaseModel]] = {"data": DataConfig, "method": MethodConfig}
    return next((models[p] for p in loc if p in models), RunConfig)
