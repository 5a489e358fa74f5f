"""Mappings that a method's own file declares: `Tags.peft`, where PEFT has the same method under other names."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Optional, cast

from pydantic import create_model
from torch import Tensor, nn

from peftree import registry
from peftree.making import states
from peftree.methods.contract import Method, Peft
from peftree.store.hfpeft.dialect import AtModules, View, refuse
from peftree.store.hfpeft.links import PREFIX, InexpressibleError, Link, Part, links_of, transposed
from peftree.store.hfpeft.schema import Targeted

WHOLE = "base_model."  # begins the name of a tensor that is the whole model's


class Declared(AtModules[Any]):
    """One such mapping: a subclass for each method."""

    peft: ClassVar[Peft]
    whole: ClassVar[bool] = True

    def config(self, view: View) -> dict[str, Any]:
        """Return the targets, the fields by PEFT's names, and the values that make it this method."""
        return super().config(view) | dict(self.peft.fixed)

    def method(self, config: Any, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return the method's name and fields."""
        for key, value in self.peft.fixed.items():
            if (found := getattr(config, key)) != value and not (found is None and not value):
                raise refuse(where, f"{key}={str(found)[:80]!r} changes what an adapter computes; use {value!r}")
        return super().method(config, model, where)

    def theirs(self, key: str, value: Any) -> Any:
        """Return PEFT's value for one of ours."""
        known = self.peft.values.get(key, {})
        if isinstance(value, str) and known and value not in known:
            raise InexpressibleError(f"{self.peft.fields[key]}={value} has no {key} there")
        return known.get(value, value)

    def mine(self, key: str, value: Any, where: Path) -> Any:
        """Return our value for one of PEFT's."""
        if value is None:
            raise refuse(where, f"{key}=None changes what an adapter computes but does not say how")
        known = self.peft.values.get(key, {})
        found = next((o for o, t in known.items() if t == value and type(t) is type(value)), value)
        if found is value and any(isinstance(o, str) for o in known) and value not in known.values():
            raise refuse(where, f"{key}={str(value)[:80]!r} changes what an adapter computes in a way unknown here")
        return found

    def links(self, view: View) -> list[Link]:
        """Return the links of every site's tensors, by name, and of those that the sites share."""
        view.only(*self.kinds, whole=self.whole)
        mine = {theirs: ours for theirs, ours in self.peft.tensors.items() if not theirs.startswith(WHOLE)}
        ends = {theirs: ours.removesuffix(".T") for theirs, ours in mine.items()}
        turned = {theirs for theirs, ours in mine.items() if ours.endswith(".T")}
        parts = [transposed(t, o, None) if t in turned else Part(t, (o,)) for t, o in ends.items()]
        return links_of(view.entries, lambda _: parts) + self._shared(view)

    def _shared(self, view: View) -> list[Link]:
        """Return the links of tensors of the whole model, each ours under the key of the first site."""
        ours = {theirs: f"/{ours}" for theirs, ours in self.peft.tensors.items() if theirs.startswith(WHOLE)}
        keys = {theirs: next(k for k in states(view.entries) if k.endswith(end)) for theirs, end in ours.items()}
        return [Link(theirs, (key,), lambda t: t[0], lambda t: [t]) for theirs, key in keys.items()]

    def extras(self, view: View) -> dict[str, Tensor]:
        """Return the part of that which is written: the whole model's. PEFT makes the rest itself."""
        return {name: value for name, value in self.known(view).items() if not name.startswith(PREFIX)}

    def known(self, view: View) -> dict[str, Tensor]:
        """Return what PEFT's file holds and ours does not."""
        found: dict[str, Tensor] = {}
        for theirs, ours in self.peft.frozen.items():
            whole = theirs.startswith(WHOLE)
            for _, site, delta in view.entries[:1] if whole else view.entries:
                value = attrgetter(ours)(delta)
                found |= {} if value is None else {theirs if whole else f"{PREFIX}{site.path}.{theirs}": value}
        return found


def declared() -> list[Declared]:
    """Return the mappings of all methods whose file declares one; a recipe uses its base's."""
    return [_made(m) for m in registry.methods().values() if m.tags.peft and m.__bases__[0] is Method]


@cache
def _made(method: type[Method]) -> Declared:
    peft = cast("Peft", method.tags.peft)
    types = {k: Any if k in peft.values else method.model_fields[f].annotation for k, f in peft.fields.items()}
    keys: dict[str, Any] = {k: (Optional[t], ...) for k, t in types.items()}  # noqa: UP045  (t is a value)
    keys |= {k: (Any, value) for k, value in peft.fixed.items()}
    schema = create_model(f"{method.__name__}Fields", __base__=Targeted, **keys)
    facts = {"peft": peft, "peft_type": peft.type, "ours": (method.name,), "schema": schema}
    facts |= {"kinds": peft.kinds, "keys": peft.fields}
    return cast("Declared", type(f"{method.__name__}InPeft", (Declared,), facts)())
