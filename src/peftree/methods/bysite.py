"""Fields by site: numbers and booleans of a method that differ between its sites, `r={"attn.q": 16, "ffn": 4}`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any, get_args

from pydantic import BaseModel
from torch import nn

from peftree import sites as site_tree
from peftree.errors import SiteError
from peftree.sites import Site

HOOKS = ("init", "before_step", "schedule", "aux_loss", "param_groups", "optimizer", "post_hoc")
ELSEWHERE = "*"  # as a key: the value of the sites that no other key means
Values = dict[str, dict[str, Any]]
"""Field, then sites, then value."""


def kinds(cls: type[BaseModel], name: str) -> set[type]:
    """Return the types of a field if it is a number or a boolean (or None), else nothing."""
    annotation = cls.model_fields[name].annotation
    found = set(get_args(annotation) or (annotation,))
    return found if found <= {int, float, bool, type(None)} else set()


def moved(cls: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with every value by site moved to `by_site`.

    Raises:
        ValueError: a boolean is given for a number.
    """
    fields = dict(given)
    by_site = fields.get("by_site") or {}
    for name, value in given.items():
        types = kinds(cls, name) if name in cls.model_fields else set()
        if types and isinstance(value, Mapping):
            values = dict(value)
            fields.pop(name)
            if ELSEWHERE in values:
                fields[name] = values.pop(ELSEWHERE)
            by_site = by_site | ({name: values} if values else {})
        if types and bool not in types and isinstance(fields.get(name), bool):
            raise ValueError(f"{name}={fields[name]!r}: it must be a number, not a boolean")
    return fields | {"by_site": by_site} if by_site else fields


def checked(method: BaseModel, values: Values, make: Callable[[str, str, Any], Any]) -> Values:
    """Return values by site as their fields parse them.

    Args:
        method: the method they belong to.
        values: the given values.
        make: parses a value of a field for some sites; ValueError if it is out of range.

    Raises:
        ValueError: a field cannot differ by site, or a hook reads it, which sees all sites at once.
    """
    cls = type(method)
    read = hooked(cls)
    for name in values:
        if name not in cls.model_fields or not kinds(cls, name):
            able = ", ".join(n for n in cls.model_fields if kinds(cls, n) and n not in read)
            raise ValueError(f"{name} cannot differ by site; these can: {able or 'none'}")
        if name in read:
            raise ValueError(f"{name} cannot differ by site: {read[name]}() of this method reads one value for all")
    return {name: {term: make(name, term, value) for term, value in terms.items()} for name, terms in values.items()}


@cache
def hooked(cls: type[BaseModel]) -> dict[str, str]:
    """Return the fields that a class's own hooks read, with the hook, from their compiled code."""
    found: dict[str, str] = {}
    for hook in HOOKS:
        seen: set[str] = set()
        queue = [hook]
        while queue:
            name = queue.pop()
            member = next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)
            code = member.fget if isinstance(member, property) else getattr(member, "__wrapped__", member)
            if name in seen or not isinstance(code, FunctionType):
                continue
            seen.add(name)
            names = set(_names(code.__code__))
            found |= dict.fromkeys(names & set(cls.model_fields), hook)
            queue += names - {"build", "parts"}
    return found


def _names(code: CodeType) -> Iterable[str]:
    """Yield the attributes that a function reads, including functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class Meaning:
    """What site terms mean on one model: the sites of a term's role or path, and those below it."""

    def __init__(self, model: nn.Module, peers: Collection[Site]) -> None:
        self.model = model
        self.peers = set(peers)
        self.known: dict[str, set[Site]] = {}

    def __call__(self, field: str, terms: str, site: Site) -> bool:
        """Return whether `terms`, a key of `field`, match `site`.

        Raises:
            SiteError: a term matches none of the adapter's sites.
        """
        if terms not in self.known:
            each = [self._sites(field, term) for term in terms.split()]
            self.known[terms] = set().union(*each)
        return site in self.known[terms]

    def _sites(self, field: str, term: str) -> set[Site]:
        found = {peer for peer in self.peers if peer.path == term}
        bases = {term} if found else set()
        problems = []
        what, at, layers = term.partition("@")
        for text in () if bases else (term, f"{what}.*{at}{layers}"):
            try:
                resolved = site_tree.resolve(self.model, text)
            except SiteError as error:
                problems.append(error)
                continue
            found |= self.peers & set(resolved)
            bases |= {site.path for site in resolved}
        if len(problems) == 2:
            raise SiteError(f"{field}: {problems[0].what}", problems[0].fix)
        found |= {peer for peer in self.peers if any(peer.path.startswith(f"{base}.") for base in bases)}
        if not found:
            roles = ", ".join(sorted({site.role for site in self.peers}))
            raise SiteError(
                f"{field} has a value for {term!r}, which is not one of the adapter's sites.",
                f"Its sites are {roles}: correct the key, or add the sites.",
            )
        return found
