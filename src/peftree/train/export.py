"""Writes a finished run's adapter for other programs; a merged model also gets its tokenizer and image settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers.utils.hub import cached_file

from peftree import store
from peftree.compose import check_packing
from peftree.files import atomic_write
from peftree.train.output import check_free
from peftree.train.run import open_run

# What stands beside the weights of a model and says how its inputs are made.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def export_run(
    run_folder: str | Path, out: str | Path, to: Literal["peft", "merged"] = "peft", quantized: str = "refuse"
) -> dict[str, Any]:
    """Write the adapter of `run_folder` to `out`; return the folder, its files, and what was written.

    Args:
        run_folder: what `train` wrote.
        out: created if needed; for `merged` it must be empty or new.
        to, quantized: see `peftree.export`.

    Raises:
        PeftreeError: as for `open_run` and `peftree.export`; BusyError: another process trains in `out`.
    """
    check_packing(quantized)
    check_free(out)
    opened = open_run(run_folder)
    folder = store.export(opened.adapter, out, to, quantized)
    if to == "merged":
        for path in companions(opened.config.model):
            atomic_write(folder / path.name, path.read_bytes())
    return {
        "folder": str(folder), "format": to, "method": opened.adapter.method.name,
        "files": sorted(path.name for path in folder.iterdir()),
    }  # fmt: skip


def companions(model: str) -> list[Path]:
    """Return the files next to the weights of a folder, or of a hub name fetched earlier; nothing is fetched."""
    place = Path(model).expanduser()
    source = str(place) if place.is_dir() else model
    quiet: dict[str, Any] = dict.fromkeys(
        ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
    )
    found = (cached_file(source, name, local_files_only=True, **quiet) for name in COMPANIONS)
    return [Path(path) for path in found if path]
