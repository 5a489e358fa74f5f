"""Strict YAML and typed values: plain values only, no key twice; errors name key, file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from peftree.errors import ConfigError, did_you_mean

MAX_BYTES = 1 << 18
MAX_DEPTH = 12


class Strict(BaseModel):
    """Values that do not change, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_yaml(path: str | Path, lines: dict[str, str]) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Args:
        path: the file: UTF-8, without anchors, no key twice.
        lines: gets `file:line` of each dotted key, for errors that come later.

    Raises:
        ConfigError: naming the file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is not a file.", "Check its name.")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes.", "This is not a settings file.")
    try:
        text = path.read_text(encoding="utf-8")
        _check_tokens(text, path)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8.", "Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line}: {problem}.", "Fix the YAML there.") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} holds no keys.", "Write `key: value` lines.")
    return _mapping(node, path, lines, "")


def packaged_yaml(path: Path) -> Any:
    """Return what a YAML file of the package or of a plug-in holds, read by libyaml where PyYAML has it.

    Raises:
        yaml.YAMLError, UnicodeDecodeError, OSError: it cannot be read.
    """
    loader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    return yaml.load(path.read_text(encoding="utf-8"), loader)  # noqa: S506 - both are safe


_OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken,
)  # fmt: skip
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def _check_tokens(text: str, path: Path) -> None:
    """Refuse what makes YAML slow or huge, token by token, before anything is built."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise ConfigError(f"{path} uses anchors or aliases (& *).", "Write the values out.")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path} is nested too deeply.", f"Use {MAX_DEPTH} levels at most.")


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[str, str], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key is not a plain word.", "Write a name as the key.")
        key = str(key_node.value)
        if key in out:
            raise ConfigError(f"{where}: {key}: is set twice.", f"Remove one; it is also in {lines[prefix + key]}.")
        lines[prefix + key] = where
        if isinstance(value_node, yaml.MappingNode):
            out[key] = _mapping(value_node, path, lines, f"{prefix}{key}.")
        else:
            out[key] = _value(value_node, where)
    return out


def _value(node: yaml.Node, where: str) -> Any:
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node, deep=True)
        # YAML 1.1 reads 1:30 as a number to the base 60; here it is a range of layers.
        return node.value if isinstance(value, int | float) and ":" in node.value else value
    except (yaml.YAMLError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {first}.", "Use plain numbers, words and lists.") from None
    finally:
        loader.dispose()


def explain(
    error: ValidationError, model: type[BaseModel], source: str = "", lines: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """Return what is wrong with values for `model`, and what to do, from pydantic's report.

    Args:
        error: the report; a misspelt key, which is also a missing key, is reported as misspelt.
        model: what the values were for.
        source: where the values come from, for values without a line of their own.
        lines: `file:line` of dotted keys, see `read_yaml`.
    """
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    loc, known = [str(part) for part in first["loc"] if part != "[key]"], lines or {}
    key = ".".join(loc)
    where = next((known[k] for k in (".".join(loc[:n]) for n in range(len(loc), 0, -1)) if k in known), source)
    where += ": " if where else ""
    info, owner = None, model
    for step in loc:  # the keys of mappings and the numbers of lists are passed over
        if step in owner.model_fields:
            info = owner.model_fields[step]
            owner = next(_models(info.annotation), owner)
    about = f"{info.description}." if info is not None and info.description else ""
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "extra_forbidden":
        return f"{where}there is no key '{key}'.", did_you_mean(loc[-1], owner.model_fields, "Keys")
    if first["type"] == "missing":
        return f"{where}{key} is missing.", f"Add {key}: {about}"
    if not loc:
        return f"{where}{message}.", "Correct it."
    default = None if info is None or info.is_required() else info.get_default(call_default_factory=True)
    said = about + (f" The default is {default!r}." if default is not None else "")
    return f"{where}{key}={first['input']!r}: {message}.", f"{key}: {said}" if said else "Correct it."


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in a type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _models(part)


SAME = "gradient_checkpointing"  # what other libraries call activations=checkpoint


def instead(tree: dict[str, Any], key: str, value: Any) -> None:
    """Take out of settings what a word `key=value` says again, under either name."""
    if key in (SAME, "activations"):
        tree.pop(SAME, None)
        if key == SAME and (value is True or tree.get("activations") == "checkpoint"):
            tree.pop("activations", None)


def once(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return settings in which `gradient_checkpointing` is said as `activations`."""
    if SAME not in values:
        return values
    on, rest = values[SAME], {k: v for k, v in values.items() if k != SAME}
    if not isinstance(on, bool):
        raise ValueError(f"{SAME}: {on!r} is not true or false")
    if "activations" in rest and on != (rest["activations"] == "checkpoint"):
        raise ValueError(f"{SAME}={str(on).lower()} and activations={rest['activations']} differ: say one of them")
    return rest | {"activations": "checkpoint"} if on else rest
