"""Strict YAML: plain values only, no key twice, and every key's line known, for errors that name it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from peftree.errors import ConfigError

MAX_BYTES = 1 << 18
MAX_DEPTH = 12


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
        raise ConfigError(f"{path} has more than {MAX_BYTES:,} bytes.", "This is no file of settings.")
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
        raise ConfigError(f"{path}{line}: {problem}.", "Mend the YAML there.") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} holds no keys.", "Write `key: value` lines.")
    return _mapping(node, path, lines, "")


_OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken,
)  # fmt: skip
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def _check_tokens(text: str, path: Path) -> None:
    """Refuse what makes YAML slow or huge, token by token, before anything is built."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise ConfigError(f"{path} uses anchors or aliases (& *).", "Write values out.")
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path} is nested too deeply.", f"Use {MAX_DEPTH} levels at most.")


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[str, str], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key is no plain word.", "Keys are names.")
        key = str(key_node.value)
        if key in out:
            raise ConfigError(f"{where}: {key}: is set twice.", f"It stands in {lines[prefix + key]} too.")
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
