"""Finds methods and recipes by walking folders and entry points; loud on a bad file, helpful on an unknown name."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, create_model

from peftree.catalogue import BRANCHES, Branch
from peftree.errors import ConfigError, MethodError, did_you_mean
from peftree.files import load_module
from peftree.methods.contract import Fusion, Method, Recipe, Tags, Union
from peftree.methods.tags import of_parts, of_recipe
from peftree.strict import Strict, explain, packaged_yaml

_HOME = Path(__file__).parent / "methods"
_GROUP = "peftree.methods"
_FOLDERS: list[Path] = []


@functools.cache
def methods() -> dict[str, type[Method]]:
    """Return every method and recipe by name, in the order of the tree.

    Raises:
        MethodError: a file defines no method or fails to load, or two files claim one name.
    """
    found: dict[str, type[Method]] = {}
    recipes: list[Path] = []
    for root in (_HOME, *_FOLDERS):
        for branch in BRANCHES:
            for path in sorted((root / branch).glob("*")):
                if path.suffix == ".py" and path.stem != "__init__":
                    _add(found, _from_file(path), path)
                elif path.suffix == ".yaml":
                    recipes.append(path)
    for point in entry_points(group=_GROUP):
        _add(found, _from_point(point), Path(point.value))
    for path in recipes:
        _add(found, _from_recipe(path, found), path)
    return dict(sorted(found.items(), key=lambda kv: (BRANCHES.index(kv[1].tags.branch), kv[0])))


def register_folder(folder: str | Path) -> None:
    """Look for methods in `folder` too; it has one sub-folder per branch, like `peftree/methods`."""
    path = Path(folder).resolve()
    if not any((path / b).is_dir() for b in BRANCHES):
        raise MethodError(f"{path} has no branch folder.", f"Create one of: {', '.join(BRANCHES)}.")
    if path not in _FOLDERS:
        _FOLDERS.append(path)
    methods.cache_clear()


def forget_folder(folder: str | Path) -> None:
    """Undo `register_folder`."""
    _FOLDERS.remove(Path(folder).resolve())
    methods.cache_clear()


def get(name: str) -> type[Method]:
    """Return the method called `name`.

    Raises:
        MethodError: there is no such method; the message names the closest one.
    """
    if (alone := _alone(name)) is not None:
        return alone
    known = methods()
    if name not in known:
        raise MethodError(f"There is no method '{name}'.", did_you_mean(name, known, "Methods"))
    return known[name]


def _alone(name: str) -> type[Method] | None:
    """Return the method of the packaged file `name`, without loading all others; None if there may be more to it."""
    if methods.cache_info().currsize or _FOLDERS or not name.isidentifier() or entry_points(group=_GROUP):
        return None
    path = next((p for b in BRANCHES if (p := _HOME / b / f"{name}.py").is_file()), None)
    cls = None if path is None else _from_file(path)
    return cls if cls is not None and cls.name == name else None


def make(name: str, fields: dict[str, Any]) -> Method:
    """Return the method `name` with these fields.

    Raises:
        ConfigError: a field is unknown or out of range; the message names field, value and remedy.
    """
    cls = get(name)
    try:
        return cls(**fields)
    except ValidationError as error:
        raise ConfigError(*explain(error, cls, name)) from None


def _add(found: dict[str, type[Method]], cls: type[Method], path: Path) -> None:
    if cls.name in found:
        taken = found[cls.name].__module__
        raise MethodError(f"{path}: the name '{cls.name}' is taken by {taken}.", "Rename one of them.")
    found[cls.name] = cls


def _from_file(path: Path) -> type[Method]:
    """Load the one method class that a file defines."""
    try:
        module = load_module(path, "peftree.methods")
    except Exception as error:  # any fault of a plug-in file is reported with its path
        raise MethodError(f"{path} does not load: {type(error).__name__}: {error}.", "Fix or remove it.") from error
    classes = [
        c for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Method) and c.__module__ == module.__name__
    ]  # fmt: skip
    if len(classes) != 1:
        what = f"{path} defines {len(classes)} methods."
        raise MethodError(what, "A method file defines exactly one Method class.")
    cls = classes[0]
    cls.name = cls.name or path.stem
    return _checked(cls, str(path), path.parent.name)


def _from_point(point: EntryPoint) -> type[Method]:
    """Load the method class that an entry point of an installed package names."""
    try:
        loaded = point.load()
    except Exception as error:  # any fault of a plug-in is reported with its entry point
        what = f"The entry point {point.name} = {point.value} does not load: {type(error).__name__}: {error}."
        raise MethodError(what, "Fix the package that it is in, or uninstall it.") from error
    cls = _checked(loaded, point.value)
    cls.name = cls.name or point.name
    return cls


def _checked(cls: Any, where: str, branch: str | None = None) -> type[Method]:
    """Return `cls` if it meets the contract's static part."""
    if not (inspect.isclass(cls) and issubclass(cls, Method)):
        raise MethodError(f"{where} gives {cls!r}, not a Method class.", "Point the entry point at a Method class.")
    problems = []
    if "tags" not in vars(cls) or not isinstance(cls.tags, Tags):
        problems.append("it declares no `tags = Tags(...)`")
    elif branch is not None and cls.tags.branch != branch:
        problems.append(f"its branch is '{cls.tags.branch}' but it lies in folder '{branch}'")
    if not issubclass(cls, Union) and cls.build is Method.build:
        problems.append("it defines no build(place)")
    if not issubclass(cls, Union) and cls.count is Method.count:
        problems.append("it defines no count(sites)")
    doc = sys.modules[cls.__module__].__doc__ or ""
    if not ("=" in (first := doc.split("\n")[0]) or "(" in first):
        problems.append("line 1 of the file does not state the equation")
    problems += [f"field '{n}' has no description" for n, f in cls.model_fields.items() if not f.description]
    if problems:
        raise MethodError(f"{where}: {'; '.join(problems)}.", "See AGENTS.md, 'Adding a method'.")
    return cls


class _Recipe(Strict):
    """The schema of a recipe file."""

    about: str = Field(description="the equation")
    paper: str
    base: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    parts: list[dict[str, dict[str, Any]]] = Field(default_factory=list)
    gated: bool = False
    tags: dict[str, Any] = Field(default_factory=dict)


def _from_recipe(path: Path, found: dict[str, type[Method]]) -> type[Method]:
    """Turn a recipe into a method class: a base with other defaults, or several parts."""
    try:
        recipe = _Recipe(**packaged_yaml(path))
        return _variant(path, recipe, found) if recipe.base else _hybrid(path, recipe, found)
    except (ValidationError, yaml.YAMLError, TypeError, KeyError) as error:
        raise MethodError(f"{path} is not a valid recipe: {error}.", "See docs: recipes.") from None


def _tags(path: Path, recipe: _Recipe, start: Tags) -> Tags:
    branch: Branch = path.parent.name  # type: ignore[assignment]
    return of_recipe(start, branch, recipe.paper, recipe.tags)


def _variant(path: Path, recipe: _Recipe, found: dict[str, type[Method]]) -> type[Method]:
    base = found[recipe.base or ""]
    fields = {n: (base.model_fields[n].annotation, _with_default(base, n, v)) for n, v in recipe.set.items()}
    make_class: Any = create_model
    cls: type[Method] = make_class(path.stem, __base__=base, __module__=base.__module__, **fields)
    cls.name, cls.tags, cls.__doc__ = path.stem, _tags(path, recipe, base.tags), recipe.about
    cls()
    return cls


def _with_default(base: type[Method], name: str, value: Any) -> Any:
    """Return the base's field, with its bounds and another default."""
    info = copy.deepcopy(base.model_fields[name])
    info.default = value
    return info


def _hybrid(path: Path, recipe: _Recipe, found: dict[str, type[Method]]) -> type[Method]:
    fields: dict[str, Any] = {}
    for part in recipe.parts:
        ((name, settings),) = part.items()
        cls = found[name]
        same = sum(known is cls for known, _ in fields.values())
        key = f"{name}_{same + 1}" if same else name
        fields[key] = (cls, Field(cls(**settings), description=f"the {name} part"))
    names = tuple(fields)
    made: type[Method] = create_model(path.stem, __base__=Recipe, __module__=__name__, **fields)
    made.name, made.__doc__ = path.stem, recipe.about
    made.member_names, made.gated = names, recipe.gated
    small = {name: dict(fields[name][0].tags.small) for name in names}
    made.tags = _tags(path, recipe, of_parts(small))
    return made


def spec(method: Method) -> dict[str, Any]:
    """Return `{"method": name, "fields": {...}}`, JSON-able, nested for composite methods."""
    return {
        "method": method.name,
        "fields": {n: _plain(v) for n in type(method).model_fields if (v := getattr(method, n)) or n != "by_site"},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Method):
        return spec(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def from_spec(value: Any) -> Any:
    """Undo `spec`: every `{"method", "fields"}` becomes a method again.

    Raises:
        MethodError, ConfigError: the name or a field is unknown or out of range.
    """
    if isinstance(value, list):
        return [from_spec(v) for v in value]
    if not (isinstance(value, dict) and set(value) == {"method", "fields"} and isinstance(value["fields"], dict)):
        return value
    fields = {str(k): from_spec(v) for k, v in value["fields"].items()}
    built: dict[str, type[Method]] = {"union": Union, "fusion": Fusion}
    cls = built.get(str(value["method"]))
    return cls(**fields) if cls else make(str(value["method"]), fields)
