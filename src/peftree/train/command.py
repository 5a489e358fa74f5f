"""The commands `peftree merge`, `export` and `convert`: flags in, calls out; imports no torch before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peftree.errors import plain
from peftree.printing import Json, emit

RunFolder = Annotated[Path, typer.Argument(help="A folder that `train` wrote, or its run file.")]


def merge(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Argument(help="Where the merged model goes; empty or new.")],
    quantized: Annotated[
        str, typer.Option(help="What a quantised base becomes: refuse, dequantize (plain), requantize (packed again).")
    ] = "refuse",
    as_json: Json = False,
) -> None:
    """Fold a trained adapter into its base model and write a plain model folder, tokenizer included."""
    _export(run_folder, out, "merged", as_json, quantized)


def export(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Argument(help="Where to write.")],
    to: Annotated[Literal["peft", "merged"], typer.Option(help="The format.")] = "peft",
    as_json: Json = False,
) -> None:
    """Write a trained adapter in Hugging Face PEFT's format, or merged into its base (see merge)."""
    _export(run_folder, out, to, as_json)


def convert(
    source: Annotated[Path, typer.Argument(help="A folder with adapter_model.bin, or the file itself.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; not the source's folder.")],
) -> None:
    """Convert a pickled Hugging Face PEFT adapter to safetensors; no code in the file is run."""
    from peftree.store.hfpeft.convert import convert as to_safetensors

    typer.echo(f"Wrote {to_safetensors(source, out)}")


def _export(
    run_folder: Path, out: Path, to: Literal["peft", "merged"], as_json: bool,
    quantized: str = "refuse",
) -> None:  # fmt: skip
    from peftree.train.export import export_run

    found = export_run(run_folder, out, to, quantized)
    emit(found, as_json)
    if not as_json:
        typer.echo(plain(f"Wrote {found['folder']}: {', '.join(found['files'])}"))
