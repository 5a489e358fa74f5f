"""`peftree plan`: a run file or a model, and settings as `key=value`; `show` makes the output. Imports no torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from peftree.errors import ConfigError


def plan(
    first: Annotated[str, typer.Argument(help="run.yaml, a model (folder with config.json, or a name), or key=value.")],
    words: Annotated[list[str] | None, typer.Argument(help="key=value: method=lora r=16 data=FILE.")] = None,
    memory: Annotated[str, typer.Option(help="Memory of one device, as in 24GB: show what fits and how.")] = "",
    adapter: Annotated[str, typer.Option(help="In place of a method: PEFT's adapter_config.json, or its folder.")] = "",
    table: Annotated[
        bool, typer.Option("--table", help="A table of methods x batches x lengths: those named, or several.")
    ] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Also time 20 real steps here.")] = False,
    html: Annotated[str, typer.Option(help="Also write one HTML page here.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Predict the memory of a run from a model's config: no weights, no GPU, nothing runs."""
    from peftree.plan.question import Request, one_method, parse_bytes, read_adapter
    from peftree.settings import read_settings, spoken

    path, rest, named = spoken(first, words or [], Request)
    more = {"memory": parse_bytes(memory)} if memory else {}
    asked = one_method(read_settings(Request, path, rest, **named, **more, peft=read_adapter(adapter)))
    if table and asked.peft:
        raise ConfigError("A table shows the tree's methods, not an adapter's file.", "Leave out --table or --adapter.")
    from rich.console import Console

    from peftree.named_method import make_method
    from peftree.plan import show

    if not asked.peft:
        make_method(asked)
    if asked.data:
        with Console(stderr=True).status("reading the rows"):
            asked, said = show.with_data(asked)
        typer.echo(said, err=as_json)
    if table or not (path or asked.peft or "method" in asked.model_fields_set):
        show.print_table(asked, as_json)
        return
    with Console(stderr=True).status("planning") as status:
        found = show.Shown.of(asked, calibrate, status.update)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        Console().print(found.render())
    if html:
        from peftree.files import atomic_write

        typer.echo(f"Wrote {atomic_write(html, found.page())}", err=as_json)
