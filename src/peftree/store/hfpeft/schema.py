"""The typed, bounded schema of PEFT's `adapter_config.json`: what is read and written; unknown keys are kept aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peftree.errors import StoreError

S = TypeVar("S", bound="Common")
Task = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


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


class Targeted(Common):
    """Keys of the methods that sit at modules."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = Field("none", pattern="^none$")


def parse(schema: type[S], raw: dict[str, Any], path: Path) -> S:
    """Return a config of type `schema`.

    Raises:
        StoreError: a key has a wrong type, or a value that peftree does not read; the message names both.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0])
        value = repr(raw.get(where))[:120]
        raise StoreError(
            f"{path}: {where}={value} is not what peftree reads: {first['msg'][:200]}.",
            "Load this adapter with peft, or correct the file.",
        ) from None


def kept(config: Common) -> dict[str, Any]:
    """Return the keys of a file that its schema does not know."""
    return dict(config.model_extra or {})
