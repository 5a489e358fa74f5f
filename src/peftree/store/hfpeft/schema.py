"""The typed, bounded schema of PEFT's `adapter_config.json`: what is read and written; unknown keys are kept."""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from peftree.errors import StoreError

S = TypeVar("S", bound="Common")
Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]

# Keys of PEFT that do not change what a finished adapter computes.
HARMLESS = (
    "corda_config", "ensure_weight_tying", "eva_config", "init_logits_std", "init_lora_weights",
    "init_vector_bank_bound", "init_weights", "loftq_config", "lora_ga_config", "megatron_core", "prompt_tuning_init",
    "prompt_tuning_init_text", "qalora_group_size", "r", "rank_dropout_scale", "runtime_config", "save_projection",
    "tokenizer_kwargs", "tokenizer_name_or_path", "use_effective_conv2d",
)  # fmt: skip
# Keys of PEFT that do, for the schemas that have no use for them.
CHANGING = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


class Common(BaseModel):
    """Keys of every PEFT method.

    `auto_mapping` names a class to import; it is never read. Keys that are not in a schema are in `model_extra`.
    """

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())
    peft_type: str
    task_type: Task | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = True
    auto_mapping: Any = Field(default=None, exclude=True)
    peft_version: Any = Field(default=None, exclude=True)
    modules_to_save: list[str] | None = None
    _tensors: dict[str, dict[str, tuple[int, ...]]] = PrivateAttr(default_factory=dict)

    def tensors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return the shapes of the method's tensors in the weights file, by module and end of the name."""
        return self._tensors


class Targeted(Common):
    """Keys of the methods that adapt modules."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"

    @field_validator("bias")
    @classmethod
    def _biases(cls, value: str) -> str:
        if value not in ("none", "all") and not value.endswith("_only"):
            raise ValueError("it must be none, all, or the method's name with _only, such as lora_only")
        return value


def parse(schema: type[S], raw: dict[str, Any], path: Path) -> S:
    """Return a config of type `schema`.

    A key that PEFT does not have is named in a warning, or refused if it looks like a misspelt one.

    Raises:
        StoreError: a key has a wrong type, or a value that peftree does not read; the message names both.
    """
    _strange(schema, raw, path)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])
        value = repr(raw.get(where))[:120]
        if first["type"] in ("literal_error", "none_required"):
            raise _changes(path, where, raw.get(where)) from None
        raise StoreError(
            f"{path}: {where}={value} is not supported: {first['msg'].removeprefix('Value error, ')[:200]}.",
            "Load this adapter with peft, or correct the file.",
        ) from None


def _changes(path: Path, key: str, value: object) -> StoreError:
    return StoreError(
        f"{path}: {key}={repr(value)[:120]} changes what an adapter computes in a way that is not supported.",
        "Load this adapter with peft.",
    )


def _strange(schema: type[S], raw: dict[str, Any], path: Path) -> None:
    """Refuse, or name in a warning, the set keys that PEFT does not have."""
    known = [*schema.model_fields, *HARMLESS]
    strange = [k for k, v in raw.items() if k not in known and v not in (None, False, "", [], {})]
    for key in strange:
        if key in CHANGING:
            raise _changes(path, key, raw[key])
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close:
            raise StoreError(
                f"{path}: {key[:80]!r} is not a key of PEFT's {raw.get('peft_type')!s:.40}.",
                f"Did you mean {close[0]!r}? Correct the file, or remove the key.",
            )
    if strange:
        version = raw.get("peft_version")
        by = f", written by peft {version[:40]}," if isinstance(version, str) else ""
        warnings.warn(
            f"{path}{by} has unknown keys that have no effect: "
            f"{', '.join(f'{k}={raw[k]!r}'[:120] for k in strange[:8])}.",
            stacklevel=2,
        )
