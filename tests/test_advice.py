"""No message advises what does not exist: commands, options, names, settings and files are looked up in the code."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

import house
import peftree
from peftree import adapter, registry, store
from peftree.cli import app
from peftree.plan.question import Request
from peftree.settings import RunConfig

REPOSITORY = Path(__file__).parents[1]
ROOT = REPOSITORY / "src" / "peftree"
MARKUP = ("report", "plan/html.py")  # these write HTML and SVG, whose attributes look like settings
# Words after the package's name that are prose, options of other programs, and keys of other libraries.
PROSE = {"cannot", "did", "has", "is", "knows", "needs", "only", "reads", "that", "writes"}
OTHERS = {"hash", "max-lora-rank", "nproc-per-node"}
FOREIGN = {
    "alpha", "attn_implementation", "config.is_decoder", "format", "init_lora_weights", "key", "slurm_partition",
    "target_modules", "use_cpu", "use_reentrant", "name", "n", "mode", "text", "workers",
    "dequantize",
}  # fmt: skip


def strings(node: ast.AST) -> Iterator[str]:
    """Every text of a module that is not a docstring; what is filled in stands as `{}`."""
    passed = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef | ast.Module) and inner.body:
            first = inner.body[0]
            passed |= {id(first.value)} if isinstance(first, ast.Expr) else set()
        if isinstance(inner, ast.JoinedStr):
            passed |= {id(v) for v in inner.values}
    for inner in ast.walk(node):
        if id(inner) in passed:
            continue
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value
        elif isinstance(inner, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in inner.values)  # type: ignore[misc]


@cache
def commands() -> set[str]:
    """The commands, and the words that may stand after the package's name in a sentence."""
    made: Any = typer.main.get_command(app)
    return set(made.commands) | PROSE


@cache
def targets() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE))


@cache
def options() -> set[str]:
    """The options of all commands."""

    def walk(command: Any) -> Iterator[str]:
        yield from (o.lstrip("-") for p in command.params for o in (*p.opts, *p.secondary_opts))
        for other in getattr(command, "commands", {}).values():
            yield from walk(other)

    shown = CliRunner().invoke(app, ["plan", "--help"]).stdout  # its options are made when they are asked for
    return {*walk(typer.main.get_command(app)), *re.findall(r"--([a-z][\w-]+)", shown), "help"}


@cache
def settings() -> set[str]:
    """The settings of runs, plans and methods, and the arguments of public functions."""

    def fields(model: type[BaseModel], before: str = "") -> Iterator[str]:
        for name, info in model.model_fields.items():
            yield before + name
            yield name
            inner = [t for t in (info.annotation, *getattr(info.annotation, "__args__", ())) if inspect.isclass(t)]
            for t in inner:
                if issubclass(t, BaseModel):
                    yield from fields(t, f"{before}{name}.")

    calls = [getattr(peftree, n) for n in peftree.__all__] + [
        getattr(adapter.Adapter, n) for n in vars(adapter.Adapter)
    ]
    calls += [store.export if hasattr(store, "export") else store.save]
    named = {p for c in calls if callable(c) for p in _parameters(c)}
    columns = {f"data.columns.{n}" for n in ("prompt", "completion", "score", "text", "label", "image")}
    plan = set(getattr(Request, "__dataclass_fields__", {}) or getattr(Request, "model_fields", {}))
    return {
        *fields(RunConfig),
        *named,
        *columns,
        *plan,
        *(f for m in registry.methods().values() for f in m.model_fields),
    }


def _parameters(call: Any) -> list[str]:
    try:
        return list(inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return []


def missing(text: str) -> list[str]:
    """What a message names that does not exist."""
    found = [f"peftree.{n}" for n in re.findall(r"\bpeftree\.(\w+)", text) if not _in_package(n)]
    found += [f"peftree {n}" for n in re.findall(r"\bpeftree ([a-z]\w*)", text) if n not in commands()]
    found += [f"adapter.{n}" for n in re.findall(r"\badapter\.(\w+)", text) if not hasattr(adapter.Adapter, n)]
    given = re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)
    found += [f"--{n}" for n in given if n not in options() | OTHERS]
    keys = re.findall(r"(?<![\w.{}<-])([a-z_][\w.]*)=(?![=>])", text)
    found += [f"{n}=" for n in keys if n not in settings() | FOREIGN]
    found += [f"make {n}" for n in re.findall(r"`make ([\w-]+)", text) if n not in targets()]
    pages = re.findall(r"\b((?:docs/)?[\w-]+\.md)\b", text)
    return found + [n for n in pages if not (REPOSITORY / n).exists()]


def _in_package(name: str) -> bool:
    return hasattr(peftree, name) or importlib.util.find_spec(f"peftree.{name}") is not None


FILES = [p for p in house.python(ROOT) if not str(p.relative_to(ROOT)).startswith(MARKUP)]


def test_every_message_names_what_exists() -> None:
    seen = [(str(p.relative_to(ROOT)), t) for p in FILES for t in strings(house.parse(p)) if " " in t]
    assert len(seen) > 1500
    wrong = {(where, name) for where, text in seen for name in missing(text)}
    assert not wrong


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Call peftree.unmerg(model) first.", "peftree.unmerg"),
        ("`peftree trian FOLDER` continues.", "peftree trian"),
        ("Use adapter.save(folder).", "adapter.save"),
        ("Pass --overwrite to write there.", "--overwrite"),
        ("Set data.colums.text=COLUMN.", "data.colums.text="),
        ("Lower learning_rat=1e-4.", "learning_rat="),
        ("`make tset` runs it.", "make tset"),
        ("See docs/recipes.md.", "docs/recipes.md"),
    ],
)
def test_what_does_not_exist_is_noticed(text: str, name: str) -> None:
    assert missing(text) == [name]
