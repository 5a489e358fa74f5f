"""`peftree plan`: its options are the fields of a request; what it shows is made in `show`. Imports no torch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from peftree.errors import ConfigError
from peftree.plan.request import Request, parse_bytes, request

_OWN = ("model", "fields", "adapter", "memory")  # given in other words than the field's own


def plan_command(**given: Any) -> None:
    """Predict the memory of a setting from a model's config: no weights, no GPU, nothing runs."""
    budget = given.pop("memory")
    memory = parse_bytes(budget) if budget else 0
    html, as_json, as_table, data = (given.pop(name) for name in ("html", "as_json", "table", "data"))
    calibrate, whole = given.pop("calibrate"), given.pop("method") or ""
    given |= {"fields": _fields(given.pop("set") or []), "memory": memory, "method": whole}
    if as_table and given["adapter"]:
        raise ConfigError("A table is of the tree's methods, not of an adapter's file.", "Leave out one of the two.")
    asked = request(**{key: value for key, value in given.items() if value or key not in ("method", "adapter")})
    from peftree.plan import show

    if data:
        asked, said = show.with_data(asked, Path(data))
        typer.echo(said, err=as_json)
    if as_table or not (whole or asked.adapter):
        show.print_table(asked, as_json)
        return
    from rich.console import Console

    with Console(stderr=True).status("planning") as status:
        found = show.Shown.of(asked, calibrate, status.update)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        Console().print(found.render())
    if html:
        from peftree.files import atomic_write

        typer.echo(f"Wrote {atomic_write(html, found.page())}", err=as_json)


def _fields(words: Sequence[str]) -> dict[str, Any]:
    """Return `["r=16", "sites=attn.q attn.v"]` as fields.

    Raises:
        ConfigError: a word has no `=`, or its value is no YAML.
    """
    import yaml

    out = {}
    for word in words:
        key, equals, value = word.partition("=")
        try:
            out[key.strip()] = yaml.safe_load(value) if equals and key.strip() else 1 / 0
        except (ZeroDivisionError, yaml.YAMLError):
            raise ConfigError(
                f"--set {word!r} sets nothing.", "Write --set r=16, or --set 'sites=attn.q attn.v'."
            ) from None
    return out


def _options() -> list[inspect.Parameter]:
    """Return one option for each field of a request."""
    out = [_option("model", str, typer.Argument(help="A folder with config.json, that file, or a hub name."), ...)]
    for name, info in Request.model_fields.items():
        if name in _OWN:
            continue
        kind: Any = str if get_args(info.annotation) else info.annotation
        choices = " | ".join(str(a) for a in get_args(info.annotation))
        text = f"{info.description}".capitalize() + (f": {choices}." if choices else ".")
        text = "A method of the tree, full or head_only; none: the table of all methods." if name == "method" else text
        flag = f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if kind is bool else "")
        out.append(_option(name, kind, typer.Option(flag, help=text), "" if name == "method" else info.default))
    more: list[tuple[str, Any, str, str, Any]] = [
        ("adapter", str, "--adapter", "In the place of a method: PEFT's adapter_config.json, or its folder.", ""),
        ("set", list[str] | None, "--set", "A field of the method, as r=16; may be given again.", None),
        ("memory", str, "--memory", "The budget of one device, as 24GB: says what fits, and the ways under it.", ""),
        ("data", str, "--data", "A file of training rows: the length is that of its longest row.", ""),
        ("table", bool, "--table", "Methods x batches x lengths.", False),
        ("calibrate", bool, "--calibrate", "Also run 20 real steps here and give the time of one.", False),
        ("html", str, "--html", "Also write one HTML page here.", ""),
        ("as_json", bool, "--json", "Print JSON instead.", False),
    ]
    return out + [_option(name, kind, typer.Option(flag, help=text), value) for name, kind, flag, text, value in more]


def _option(name: str, kind: Any, info: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


plan_command.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
plan_command.__annotations__ = {o.name: o.annotation for o in _options()}
