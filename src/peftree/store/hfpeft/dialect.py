"""What a mapping between one PEFT method and one of ours must define."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic

from torch import Tensor, nn

from peftree import registry
from peftree.errors import MethodError, SiteError, StoreError
from peftree.making import Entries
from peftree.methods.bysite import Meaning
from peftree.methods.contract import Method
from peftree.sites import Site
from peftree.store.hfpeft.links import PREFIX, InexpressibleError, Link, Part, links_of
from peftree.store.hfpeft.names import query, shortest, targeted
from peftree.store.hfpeft.schema import Common, S


@dataclass(frozen=True)
class View:
    """An adapter as a mapping sees it.

    Attributes:
        model: the model it is on, or will go on.
        method: our method.
        entries: its places, without the task head.
        config: the config that it is read from, if that is foreign.
        shifts: its places with trained biases, which are a separate part here (`lora_bias`).
    """

    model: nn.Module
    method: Method
    entries: Entries
    config: Common | None = None
    shifts: Entries = dataclasses.field(default_factory=list)

    def at(self, site: Site) -> Any:
        """Return the method with the fields it has at `site`."""
        return self.method.at(site, self._means)

    @cached_property
    def _means(self) -> Meaning:
        return Meaning(self.model, [site for _, site, _ in self.entries])

    def only(self, *kinds: str, whole: bool = False) -> None:
        """Raise InexpressibleError unless every site is of one of these kinds (and no slice of a fused projection)."""
        for _, site, _ in self.entries:
            if site.kind not in kinds:
                raise InexpressibleError(f"{site.name} is a site of kind {site.kind}")
            if whole and site.rows is not None:
                raise InexpressibleError(f"{site.name} is a slice of the fused projection {site.path}")

    @property
    def paths(self) -> list[str]:
        """The modules it sits at, each once, in model order."""
        return list(dict.fromkeys(site.path for _, site, _ in self.entries))


class Dialect(ABC, Generic[S]):
    """One PEFT method: its schema, our method, and the links between the tensors of both.

    Attributes:
        peft_type: its name in `adapter_config.json`.
        schema: the schema of that file.
        ours: names of our methods that it writes, including recipes made from them.
        rest: names of small tensors that PEFT has no place for and that do not change the output; the manifest keeps
            them.
        sited: our fields that may differ between sites in PEFT; None: all.
        root: the prefix of the names of the base's modules in its file.
        derived: names of tensors that follow from the base and the fields where a foreign file leaves them out.
    """

    peft_type: ClassVar[str]
    schema: type[S]
    ours: ClassVar[tuple[str, ...]]
    rest: ClassVar[tuple[str, ...]] = ()
    root: ClassVar[str] = PREFIX
    sited: ClassVar[tuple[str, ...] | None] = ()
    derived: ClassVar[tuple[str, ...]] = ()

    def writes(self, method: Method) -> bool:
        """Return whether `method` is one of ours that has this form."""
        known = registry.methods()
        return any(name in known and isinstance(method, known[name]) for name in self.ours)

    @abstractmethod
    def config(self, view: View) -> dict[str, Any]:
        """Return this method's own keys of `adapter_config.json`.

        Raises:
            InexpressibleError: the adapter has no exact form there.
        """

    @abstractmethod
    def method(self, config: S, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return the name and fields of our method for a config.

        Raises:
            StoreError: the config asks for something that has no exact form here.
        """

    @abstractmethod
    def links(self, view: View) -> list[Link]:
        """Return the links of all tensors but the task head's."""

    def beside(self, config: S, method: Method) -> list[Method]:
        """Return the parts that a config adds to its method."""
        return []

    def extras(self, view: View) -> dict[str, Tensor]:
        """Return tensors of the file that are not trained but follow from the fields (frozen random bases)."""
        return {}

    def known(self, view: View) -> dict[str, Tensor]:
        """Return tensors that must have these values if a file holds them: what is written, and what PEFT adds."""
        return self.extras(view)

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """Return whether this mapping, among those of one `peft_type`, reads a config."""
        return True


class AtModules(Dialect[S]):
    """A PEFT method that sits at modules named by `target_modules`.

    Attributes:
        kinds: the kinds of sites that PEFT can put it at; `whole`: but not at a slice of a fused projection.
        keys: our field by the key of PEFT's config that means the same.
        parts: how PEFT's tensors at a module are made of ours.
    """

    kinds: ClassVar[tuple[str, ...]]
    whole: ClassVar[bool] = False
    keys: ClassVar[Mapping[str, str]] = {}
    parts: ClassVar[tuple[Part, ...]] = ()

    def config(self, view: View) -> dict[str, Any]:
        """Return the modules that it sits at, and the fields by PEFT's names."""
        view.only(*self.kinds, whole=self.whole)
        fields = {key: self.theirs(key, getattr(view.method, name)) for key, name in self.keys.items()}
        return {"target_modules": shortest(view.model, view.paths)} | fields

    def method(self, config: S, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return our method at the modules that a config targets, with its fields."""
        fields = {name: self.mine(key, getattr(config, key), where) for key, name in self.keys.items()}
        return self.ours[0], {"sites": self.sites(config, model, where)} | fields

    def links(self, view: View) -> list[Link]:
        """Return the links of every site's tensors."""
        view.only(*self.kinds, whole=self.whole)
        return links_of(view.entries, lambda _: self.parts)

    def theirs(self, key: str, value: Any) -> Any:
        """Return PEFT's value for one of ours."""
        return value

    def mine(self, key: str, value: Any, where: Path) -> Any:
        """Return our value for one of PEFT's."""
        return value

    def sites(self, config: Any, model: nn.Module, where: Path) -> str:
        """Return our request for the modules that a config targets."""
        return query(model, targeted(model, config, where), where)


def transposes(view: View) -> dict[str, Any]:
    """Return the key that says whether the base's weights are `[in, out]`."""
    return {"fan_in_fan_out": bool(view.entries) and all(site.kind == "conv1d" for _, site, _ in view.entries)}


def refuse(where: Path, what: str, fix: str = "Load this adapter with peft.") -> StoreError:
    """Return the error for a config that has no exact form here."""
    return StoreError(f"{where}: {what}.", fix)


@contextmanager
def exactly(where: Path, foreign: bool = False) -> Iterator[None]:
    """Inside, what has no exact form, and in a `foreign` file what no site here can hold, is refused by its config."""
    try:
        yield
    except (InexpressibleError, MethodError, SiteError) as error:
        if isinstance(error, InexpressibleError) or foreign:
            raise refuse(where, getattr(error, "reason", error.what.removesuffix("."))) from None
        raise
