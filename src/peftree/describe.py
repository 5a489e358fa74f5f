"""Descriptions for people and programs: the tree of methods, one method, the sites of a model."""

from __future__ import annotations

import ast
import dataclasses
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftree.catalogue import BRANCHES
from peftree.methods.tags import Tags, of_parts, of_recipe
from peftree.strict import packaged_yaml

if TYPE_CHECKING:
    from torch import nn

    from peftree.methods.contract import Method


def method_rows() -> list[dict[str, Any]]:
    """Return one row per method, in the order of the tree, from its declared tags."""
    return [
        {
            "branch": tags.branch, "name": name, "identity at start": tags.identity_at_init,
            "merges": tags.mergeable, "adds tokens": tags.lengthens_sequence,
            "needs data": tags.needs_data, "needs dense weight": tags.needs_dense_weight,
            "inference cost": tags.inference_cost, "default lr": tags.lr, "default lr from": tags.lr_from,
            "paper": tags.paper, "equation": formula,
        }
        for name, (tags, formula) in facts().items()
    ]  # fmt: skip


def facts() -> dict[str, tuple[Tags, str]]:
    """Return tags and equation of every method, in the order of the tree.

    The package's files are read without running them, which needs no torch; if others add methods, all are loaded.
    """
    if "peftree.registry" not in sys.modules and not entry_points(group="peftree.methods"):
        return _stated()
    from peftree import registry

    return {name: (cls.tags, equation(cls)) for name, cls in registry.methods().items()}


def _stated() -> dict[str, tuple[Tags, str]]:
    """Return tags (without `peft` and what depends on a model's size) and equation, as the package's files state."""
    paths = [(branch, path) for branch in BRANCHES for path in sorted((HOME / branch).glob("*")) if path.is_file()]
    found = {path.stem: _of_file(path) for _, path in paths if path.suffix == ".py" and path.stem != "__init__"}
    for branch, path in paths:
        if path.suffix == ".yaml":
            said = packaged_yaml(path)
            base = found[said["base"]][0] if "base" in said else of_parts({})
            found[path.stem] = of_recipe(base, branch, said["paper"], said.get("tags", {})), said["about"].strip()
    return dict(sorted(found.items(), key=lambda kv: (BRANCHES.index(kv[1][0].branch), kv[0])))


def _of_file(path: Path) -> tuple[Tags, str]:
    tree = ast.parse(path.read_text("utf-8"), str(path))
    lines = (line for node in tree.body if isinstance(node, ast.ClassDef) for line in node.body)
    call: Any = next(v.value for v in lines if isinstance(v, ast.AnnAssign) and ast.unparse(v.target) == "tags")
    given = dict(zip((f.name for f in dataclasses.fields(Tags)), call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords}
    literal = {k: ast.literal_eval(v) for k, v in given.items() if k not in ("small", "known", "peft")}
    return Tags(**literal), _formula(ast.get_docstring(tree) or "")


def _formula(doc: str) -> str:
    """Return the equation in line 1 of a method's file."""
    first = doc.strip().split("\n")[0]
    return first.partition(": ")[2].rstrip(".") or first


HOME = Path(__file__).parent / "methods"
TREE = HOME / "tree.yaml"


def tree_rows() -> list[dict[str, Any]]:
    """Return the rows of the survey's tree: number, name, branch, paper, state, what does it, what is missing.

    `STATES` says what a state means, `NEEDS` what is missing.
    """
    known, found = facts(), []
    for row in packaged_yaml(TREE):
        mine = [name for name in row.pop("methods", []) if name in known]
        needs, functions = row.pop("needs", []), row.pop("functions", [])
        marks = [state for state in ("record", "out") if row.pop(state, False)]
        state = "works" if mine or functions else marks[0] if marks else "open" if needs else "designed"
        rest = [] if state == "works" else needs
        found.append(row | {"state": state, "methods": mine, "functions": functions, "needs": rest})
    return found


STATES = {
    "works": "a method, or a function of peftree, does it; the last column names it",
    "designed": "the contract can express it, but no file does",
    "open": "the contract lacks what the last column names",
    "record": "a record in docs/decisions says why there is no code",
    "out": "it does not adapt a model",
}
NEEDS = {
    "GRAD": "gradients over several steps, or an optimizer that the method brings",
    "PROC": "stages and searches over recipes",
    "PROMPT": "virtual tokens that enter at a deeper layer, or queries that belong to an adapter",
    "TASK": "the batch in a method's loss",
    "TEXT": "token ids of a phrase when the adapter is built",
}


OURS = "chosen here"  # where a default rate is from if neither a paper nor its authors' code has it


def equation(cls: type[Method]) -> str:
    """Return the equation of a method: line 1 of its file, or what its recipe says."""
    if cls.__name__ == cls.name:
        return (cls.__doc__ or "").strip()
    return _formula(sys.modules[cls.__module__].__doc__ or "")


def describe_method(name: str) -> dict[str, Any]:
    """Return equation, paper, tags and fields of one method."""
    from peftree import registry

    cls = registry.get(name)
    fields = cls.model_json_schema(mode="serialization").get("properties", {})
    rows = [
        {
            "name": n, "type": _type(fields.get(n, {})), "default": str(info.get_default(call_default_factory=True)),
            "limits": _limits(fields.get(n, {})), "description": info.description or "",
        }
        for n, info in cls.model_fields.items()
        if n != "by_site"  # it is written in the other fields
    ]  # fmt: skip
    text = (sys.modules[cls.__module__].__doc__ or "").strip()
    return {
        "name": name, "branch": cls.tags.branch, "paper": cls.tags.paper, "equation": equation(cls),
        "about": text, "tags": dataclasses.asdict(cls.tags), "fields": rows,
    }  # fmt: skip


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(str(v) for v in schema["enum"])
    return str(schema.get("type", schema.get("$ref", "method").rpartition("/")[2]))


def _limits(schema: dict[str, Any]) -> str:
    names = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " ".join(f"{sign} {schema[key]}" for key, sign in names.items() if key in schema)


def inspect_model(source: str) -> dict[str, Any]:
    """Return class, parameter count and sites of the model that `source` names; no weights are read.

    Raises:
        ConfigError: there is no config, or transformers knows no class for it.
    """
    from peftree import sites

    model = skeleton(source)
    return {
        "model": source, "class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()),
        "sites": sites.summary(model), "unclear": sites.why_unclear(model),
    }  # fmt: skip


def skeleton(source: str) -> nn.Module:
    """Return the model of a config on the meta device: shapes without values.

    Raises:
        ConfigError: there is no config, or transformers knows no class for it.
    """
    from peftree.plan.skeleton import bare_class, build, read_config

    config = read_config(source)
    return build(config, bare_class(config))
