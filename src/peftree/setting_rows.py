"""Every setting of a run as rows: key, type, default, meaning; for `train --help` and the page of settings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from peftree.settings import RunConfig

_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
INNER = {"DataConfig", "MethodConfig"}


class Setting(NamedTuple):
    """One setting: its dotted key, what it holds, its default as written in YAML, and what it means."""

    key: str
    type: str
    default: str
    meaning: str


def settings(kind: type[RunConfig] = RunConfig) -> list[Setting]:
    """Return every setting of a run, or of a kind that has more, in the order of the configuration."""
    schema = kind.model_json_schema()
    return list(_rows(schema, schema["$defs"], ""))


def _rows(schema: dict[str, Any], parts: dict[str, Any], prefix: str) -> Iterator[Setting]:
    for name, field in schema["properties"].items():
        inner = field.get("$ref", "").rpartition("/")[2]
        if inner in INNER:
            yield from _rows(parts[inner], parts, f"{prefix}{name}.")
            continue
        needed = name in schema.get("required", ())
        default = "must be given" if needed else _written(field.get("default", {}))
        yield Setting(prefix + name, _type(field), default, field["description"])


def _type(field: dict[str, Any]) -> str:
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    words = []
    for kind in kinds:
        limits = [f"{sign} {kind[name]:,}" for name, sign in _LIMITS.items() if name in kind]
        named = " | ".join(map(str, kind.get("items", kind).get("enum", ()))) or str(kind.get("type", "text"))
        plain = {"string": "text", "object": "mapping", "boolean": "true | false"}.get(named, named)
        words.append(" ".join([plain, ", ".join(limits)]).strip())
    return " or ".join(words)


def _written(value: Any) -> str:
    """Return a default as YAML writes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def text(kind: type[RunConfig] = RunConfig, width: int = 100) -> str:
    """Return all settings of a kind as plain text of that width."""
    lines = ["Settings, as key=value or in run.yaml (docs/settings.md); method fields: peftree methods NAME", ""]
    for row in settings(kind):
        lines.append(f"  {row.key} = {row.default}  ({row.type})")
        lines += textwrap.wrap(row.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return all settings as a page of Markdown."""
    head = (
        "# Settings of a run\n\n"
        "Every setting of `peftree train`, written by `make settings-page` from the code; `peftree train --help` shows "
        "the same.\n\n"
        "On the command line, write a setting as `key=value`, dotted if it is inside another (`data.test=t.csv`); in a "
        "file, write YAML. `data=reviews.csv`\n"
        "is short for `data.train=reviews.csv`, `method=dora` for `method.name=dora`, and a key that is not a "
        "setting, such as `r=32`, is one of the\n"
        "method's fields: `peftree methods lora` lists them. `none` means that the method, the model or the "
        "data decides.\n\n"
    )
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for row in settings():
        cells = (f"`{row.key}`", row.type, f"`{row.default}`", row.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |")
    return head + "\n".join(rows) + "\n"
