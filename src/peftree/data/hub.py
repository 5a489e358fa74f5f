"""Rows of a data set on a hub, read by the `datasets` library: all of a split, or its first rows as they come."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any
from urllib.parse import parse_qs

from peftree.errors import DataError, first_line
from peftree.settings import HUB
from peftree.trusted import on_hub


def named(source: object) -> bool:
    """Whether a source is a hub name, as `settings.hub_name` writes it."""
    return str(source).startswith(HUB)


def rows(source: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the record of every row of a split.

    Raises:
        ConfigError: the hub has no such data set, or cannot be reached.
        DataError: `datasets` is not installed, or there is no such split or configuration.
    """
    name, _, more = str(source).removeprefix(HUB).partition("?")
    asked = {key: values[0] for key, values in parse_qs(more).items()}
    split, most = asked["split"], int(asked.get("rows", 0))
    try:
        from datasets import load_dataset
        from datasets.features.features import require_storage_embed
        from datasets.table import embed_table_storage
    except ImportError:
        raise DataError(f"Reading {name} from the hub needs datasets.", "Run: pip install 'peftree[hub]'.") from None
    on_hub(name, "dataset")
    try:
        found = load_dataset(name, asked.get("config"), split=split, streaming=bool(most))
    except Exception as error:  # noqa: BLE001  a builder's own error, of any kind, says what the hub's files lack
        raise DataError(
            f"{name}, split {split}: {first_line(error)}.",
            "Name one of its splits and configurations: {hub: .., split: .., config: ..}.",
        ) from None
    inside = any(map(require_storage_embed, (found.features or {}).values()))
    for number, table in enumerate(islice(found.with_format("arrow"), most or None), 1):  # nothing is decoded
        where = f"{name} {split} row {number}"
        try:
            record = (embed_table_storage(table) if inside else table).to_pylist()[0]
        except Exception as error:  # noqa: BLE001  each file system that an image may be in has its own
            raise DataError(f"{where}: an image cannot be read: {first_line(error)}.", "Replace it.") from None
        yield where, record
