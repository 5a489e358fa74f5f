"""Which methods passed every check on every architecture, as their files were then: passed.json.

`make contract` runs what is not in it, and writes it. A method whose file is not the one that passed has every check
in the tests too; of the others the tests run a part.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tomllib
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
import yaml
from _pytest.config import parse_warning_filter
from tqdm import tqdm

import peftree
import zoo
from contract.case import fits, small
from contract.checks import CHECKS
from peftree import registry
from peftree.errors import PeftreeError
from peftree.files import atomic_write

RECORD = Path(__file__).with_name("passed.json")
RARE = ("convnext",)
SETTINGS = Path(__file__).parents[2] / "pyproject.toml"
METHODS = Path(peftree.__file__).parent / "methods"


def quick_model(name: str) -> str:
    """The architecture of the quick run: a decoder, where most checks apply, or one that sees images."""
    return "vit" if all(term.startswith("vision:") for term in registry.get(name)().sites.split()) else "decoder"


def models(name: str) -> list[str]:
    """The architectures of the whole contract; those of convolutions for what fits there alone."""
    try:
        return [*zoo.CORE] if any(fits(small(name, m)) for m in zoo.CORE) else [*RARE]
    except PeftreeError:  # which its tests will say
        return [*zoo.CORE]


def every(name: str, model: str) -> set[str]:
    """The whole contract on one architecture; what takes long, or looks at all of them, on the first."""
    first = next((m for m in (quick_model(name), *models(name)) if fits(small(name, m))), None)
    assert first, f"{name} has no place in any of {', '.join((*zoo.CORE, *RARE))}, so nothing of it is checked"
    return set(CHECKS) - (set() if model == first else {"compiled_passes", "effects", "elsewhere"})


def failures(name: str, model: str, checks: Iterable[str]) -> list[str]:
    """Which of `checks` the method fails on a tiny model, with the reason; where it does not fit it must be refused."""
    case = small(name, model)
    if not fits(case):
        try:
            case.adapted()
        except PeftreeError:
            return []
        return ["it has no place here, and is not refused"]
    found = []
    for check in sorted(set(checks) - set(case.tags.known)):
        try:
            CHECKS[check](case)
        except Exception as error:
            found.append(f"{check}: {type(error).__name__}: {str(error)[:400]}")
    return found


def sources(name: str) -> list[Path]:
    """The method's file and, of a recipe, those of its base or parts; none for a method of another package."""
    here = [path for path in METHODS.glob("*/*") if path.stem == name and path.suffix in (".py", ".yaml")]
    recipe = yaml.safe_load(here[0].read_text()) if here and here[0].suffix == ".yaml" else {}
    made_from = [recipe.get("base"), *(part for parts in recipe.get("parts", []) for part in parts)]
    return here + [path for other in made_from if other for path in sources(other)]


def key(name: str) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources(name))).hexdigest()[:16]


@cache
def record() -> dict[str, str]:
    return dict(json.loads(RECORD.read_text())) if RECORD.is_file() else {}


def changed(name: str) -> bool:
    """Whether the method is new, or its file is not the one that passed every check on every architecture."""
    return not sources(name) or record().get(name) != key(name)


def whole(name: str) -> tuple[str, list[str]]:
    """The method, and what it fails of every check on every architecture."""
    found = []
    with warnings.catch_warnings():
        for line in tomllib.loads(SETTINGS.read_text())["tool"]["pytest"]["ini_options"]["filterwarnings"]:
            warnings.filterwarnings(*parse_warning_filter(line, escape=False))
        for model in models(name):
            torch.manual_seed(0)
            try:
                found += [f"{name} on {model}: {what}" for what in failures(name, model, every(name, model))]
            except Exception as error:
                found.append(f"{name} on {model}: {type(error).__name__}: {error}")
    return name, found


def written(found: dict[str, str]) -> str:
    return json.dumps(found, indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Run every check over the methods that changed, and keep which passed; those that were not reached stay due."""
    found = {name: value for name, value in record().items() if name in registry.methods()}
    due = {name: key(name) for name in registry.methods() if sources(name) and changed(name)}
    atomic_write(RECORD, written(found))
    wrong: list[str] = []
    spawn = multiprocessing.get_context("spawn")  # with new processes now and then: compiling fills them
    with spawn.Pool(os.cpu_count(), maxtasksperchild=8) as pool, tqdm(total=len(due)) as bar:
        for name, problems in pool.imap_unordered(whole, due):
            wrong += problems
            if not problems:
                found[name] = due[name]
                atomic_write(RECORD, written(found))
            for problem in problems:
                bar.write(problem)
            bar.update()
    print(f"{len(due)} methods checked, {len(wrong)} checks failed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
