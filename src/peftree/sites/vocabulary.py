"""The names of modules, read from `vocabulary.yaml`, by which maps are known without a record."""

from __future__ import annotations

from pathlib import Path

from peftree.strict import packaged_yaml

_FOUND = packaged_yaml(Path(__file__).with_name("vocabulary.yaml"))


def _listed(key: str) -> tuple[str, ...]:
    return tuple(_FOUND[key].split())


NAMES: dict[str, frozenset[str]] = {role: frozenset(words.split()) for role, words in _FOUND["names"].items()}
TOWERS: dict[str, tuple[str, ...]] = {tower: tuple(words.split()) for tower, words in _FOUND["towers"].items()}
PAIRS, GATED, PLAIN = (dict[str, str](_FOUND[key]) for key in ("pairs", "gated", "plain"))
CROSS, COUNTS, KEYS, EMBEDDINGS = map(_listed, ("cross", "counts", "keys", "embeddings"))
THIRDS, WRAPPED, HEADS = (frozenset(_listed(key)) for key in ("thirds", "wrapped", "heads"))
