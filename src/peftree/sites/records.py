"""Role records: one YAML file per model family that says where its layers, projections and norms are."""

from __future__ import annotations

import importlib.metadata
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from peftree.errors import SiteError
from peftree.strict import explain, packaged_yaml

Tower = Literal["text", "vision", "audio", "encoder", "decoder"]
TOWERS: tuple[str, ...] = (*get_args(Tower), "connector", "model")
Role = Literal[
    "attn.q", "attn.k", "attn.v", "attn.o", "attn.kv", "attn.qkv", "xattn.q", "xattn.k",
    "xattn.v", "xattn.o", "xattn.kv", "xattn.qkv", "ffn.up", "ffn.gate", "ffn.down", "conv", "linear",
]  # fmt: skip
Outside = Literal["embed", "embed.position", "embed.type", "norm", "conv"]
ROLES = frozenset((*get_args(Role), *get_args(Outside), "attn", "xattn", "ffn", "layer", "head", "stack"))
FOLDER = Path(__file__).parent.parent / "roles"
_ADDED: dict[Path, Record] = {}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Part):
    """Where a role's weight is, relative to its layer; may be written as a plain path.

    `slice` names the rows of a fused weight: `1/3` is the second of three equal parts; `q`, `k`,
    `v` are parts as wide as the heads of the query or the (grouped) keys and values.
    `parameter` names a 3-D parameter of stacked experts; so does `weight` in a module that is not a linear map.
    With `split` it is one map instead, and that side of it is the last two dimensions (heads by their width).
    """

    path: str
    slice: str | None = Field(None, pattern=r"^(\d+/[1-9]\d*|[qkv])$")
    parameter: str = "weight"
    split: Literal["", "in", "out"] = ""


class Attention(_Part):
    """An attention module: its path, input, residual stream, and where head counts are.

    `heads` and `kv_heads` name fields of the config (or attributes of the module), `copies` how often the module itself
    repeats all heads of keys and values, one set after the other, before it attends.
    """

    module: str
    source: str | None = Field(None, alias="in")
    residual: str | None = None
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    copies: str = ""


class Branch(_Part):
    """A sub-layer: the modules its input enters, its output leaves, its residual stream enters.

    `router`: of a mixture of experts, the module that returns each token's logits, weights and experts.
    """

    source: str = Field(alias="in")
    out: str
    residual: str | None = None
    router: str | None = None


def _places(value: Any) -> Any:
    """Let `path`, `{path: ...}` and a list of either stand for a list of places."""
    rows = value if isinstance(value, list) else [value]
    return [{"path": row} if isinstance(row, str) else row for row in rows]


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Places = Annotated[tuple[Place, ...], BeforeValidator(_places)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class Layout(_Part):
    """One stack of layers. Paths hold `*` for "every child".

    `layers`, `embed` and `outside` are relative to the stack, all other paths to one layer.
    If several layouts are given, the first applies whose `when` equals the config's fields and
    whose roles, except those in `optional`, are all found. `causal` may name a config field.
    `length_first`: layers take `[length, rows, width]`; methods of whole stacks do not fit then.
    """

    tower: Tower
    layers: str
    when: dict[str, Any] = {}
    causal: bool | str = False
    embed: str | None = None
    roles: dict[Role, Places]
    optional: tuple[Role, ...] = ()
    attn: Attention | None = None
    xattn: Attention | None = None
    ffn: Branch | None = None
    norms: Names = ()
    outside: dict[Outside, Names] = {}
    unit_offset: bool = False
    length_first: bool = False


class Record(_Part):
    """One model family: stacks, or for a composite model what is around its parts' stacks.

    `model_types` are values of `config.model_type`; `classes` are class names, for models without
    a config. Composite models: `connector` paths hold the projections between towers, `heads`
    gives outer projections a tower, `towers` renames the tower of a sub-module, and
    `default_towers` apply if a query names none.
    """

    model_types: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    stacks: tuple[Layout, ...] = ()
    connector: Names = ()
    heads: dict[str, Tower] = {}
    towers: dict[str, Tower] = {}
    default_towers: tuple[Tower, ...] = ()


def read_record(path: str | Path) -> Record:
    """Read and check one record file.

    Raises:
        SiteError: the file is missing or not YAML, or a key or value is wrong; the message names file and key.
    """
    path = Path(path)
    try:
        data = packaged_yaml(path)
        record = Record.model_validate(data)
    except OSError as error:
        raise SiteError(f"The role record {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SiteError(f"The role record {path} is not YAML: {error}") from None
    except ValidationError as error:
        what, fix = explain(error, Record, f"The role record {path}")
        raise SiteError(what, f"{fix} See {FOLDER / 'llama.yaml'}.") from None
    if not record.model_types and not record.classes:
        raise SiteError(f"The role record {path} names no model.", "Give it model_types or classes.")
    return record


def register_record(path: str | Path) -> Record:
    """Add a record file for this process; it takes precedence over the packaged records.

    Raises:
        SiteError: see `read_record`.
    """
    record = read_record(path)
    _ADDED[Path(path).resolve()] = record
    return record


@cache
def _packaged() -> dict[str, tuple[Path, Record]]:
    """Return the packaged records and those of entry points `peftree.roles`, by type or class."""
    found: dict[str, tuple[Path, Record]] = {}
    for file in [*sorted(FOLDER.glob("*.yaml")), *_entry_points()]:
        record = read_record(file)
        for name in (*record.model_types, *record.classes):
            if name in found:
                raise SiteError(
                    f"The role records {found[name][0]} and {file} both describe '{name}'.",
                    "Remove it from one of them.",
                )
            found[name] = (file, record)
    return found


def _entry_points() -> list[Path]:
    """Return the YAML files next to each module that an entry point `peftree.roles` names."""
    files: list[Path] = []
    for point in importlib.metadata.entry_points(group="peftree.roles"):
        try:
            place = Path(point.load().__file__).parent
        except (ImportError, AttributeError, TypeError) as error:
            raise SiteError(
                f"The entry point peftree.roles '{point.name}' ({point.value}) does not load: {error}.",
                "It must name a module whose folder holds record files; fix or remove it.",
            ) from None
        files += sorted(place.glob("*.yaml"))
    return files


def records() -> dict[str, Record]:
    """Return every known record by model type and by class name; added ones take precedence."""
    found = {name: record for name, (_, record) in _packaged().items()}
    for record in _ADDED.values():
        found |= dict.fromkeys((*record.model_types, *record.classes), record)
    return found
