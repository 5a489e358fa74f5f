"""The tree of sites of a model: its stacks, what joins them, its heads, its default towers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from peftree.errors import SiteError
from peftree.sites.generic import ROLE_OF, generic_sites, modality, outputs_of
from peftree.sites.infer import infer, no_stack
from peftree.sites.parts import Modules, aliases_of, expand, inside, modules_of, site_at
from peftree.sites.places import Site
from peftree.sites.reader import StackReader
from peftree.sites.records import Record, records
from peftree.sites.stacks import Stack, find_composites, find_stacks

# Outer linears that come with the pretrained weights, by the first name on their path.
PRETRAINED_HEADS = frozenset(
    "lm_head embed_out proj_out cls vocab_transform vocab_projector generator_predictions "
    "generator_lm_head discriminator_predictions predictions text_projection "
    "visual_projection".split()
)


@dataclass(frozen=True)
class Survey:
    """All that is known about a model: its modules, stacks, sites, and default towers.

    `aliases` gives the other paths of modules that are in several places. `unclear` says why there are no stacks:
    then every linear map, convolution, norm and embedding is a site by its kind, and there are no roles.
    """

    modules: Modules
    stacks: tuple[Stack, ...]
    sites: tuple[Site, ...]
    default_towers: tuple[str, ...]
    projections: frozenset[str]
    aliases: dict[str, str] = field(default_factory=dict)
    unclear: SiteError | None = None

    @cached_property
    def towers(self) -> list[str]:
        """The towers of the model, in order."""
        return list(dict.fromkeys(site.tower for site in self.sites))

    @cached_property
    def tower_of(self) -> dict[str, str]:
        """The tower of every path that has a site."""
        return {site.path: site.tower for site in self.sites}


_surveys: ContextVar[dict[int, Survey] | None] = ContextVar("peftree_surveys", default=None)


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Inside, models are only read, so that each is surveyed once (in this thread or task)."""
    token = _surveys.set({} if (known := _surveys.get()) is None else known)
    try:
        yield
    finally:
        _surveys.reset(token)


def survey(model: nn.Module) -> Survey:
    """Find all that is known about `model`; an unknown structure is not an error here."""
    known = _surveys.get()
    if known is None:
        return _survey(model)
    if id(model) not in known:
        known[id(model)] = _survey(model)  # it holds the model, so that no other one gets its id meanwhile
    return known[id(model)]


def _survey(model: nn.Module) -> Survey:
    modules, aliases = modules_of(model), aliases_of(model)
    around = find_composites(modules)
    stacks, why = find_stacks(modules, around)
    if why is None and not any(stack.path == "" for stack in stacks):
        stacks += infer(modules, [stack.path for stack in stacks])
    try:
        sites = [site for stack in stacks for site in StackReader(modules, stack).sites()]
    except SiteError as error:
        why = error
    if why or not stacks:
        why = why or no_stack(modules, sorted(records()))
        return Survey(modules, (), tuple(generic_sites(modules)), (modality(modules),), frozenset(), aliases, why)
    taken = {site.path for site in sites}
    connector = _connector(modules, around, stacks)
    sites += [site for path in connector if (site := _connector_site(modules, path))]
    towers = _default_towers(around, stacks)
    sites += _heads(modules, stacks, {*connector, *taken}, around, towers)
    order = {path: index for index, path in enumerate(modules)}
    # A branch's path is its output module: it belongs where its sub-layer starts.
    sites.sort(key=lambda site: (order[site.source or site.path], site.rows or (0, 0)))
    projections = frozenset(name for record in around.values() for name in record.heads)
    return Survey(modules, tuple(stacks), tuple(sites), towers, projections, aliases)


def tree(model: nn.Module) -> list[Site]:
    """Return every site of `model` in model order; only shapes are read (the meta device is enough).

    A model of unknown structure has its linear maps, convolutions, norms and embeddings as sites, but no
    attention, branch, layer or stack.
    """
    return list(survey(model).sites)


def why_unclear(model: nn.Module) -> str:
    """Return why `model` has no roles and how to name its places; empty if its structure is known."""
    found = survey(model).unclear
    return str(found) if found else ""


def task_head(model: nn.Module) -> list[Site]:
    """Return the heads that are new for a task (classifiers, regressors); none for `lm_head`.

    A model made of pretrained parts has more new modules: those that join the parts. Its config names these
    modules in `fresh_modules`, as `["multi_modal_projector"]`; its class does not tell.
    """
    found = survey(model)
    pretrained = PRETRAINED_HEADS | found.projections
    fresh = frozenset(getattr(getattr(model, "config", None), "fresh_modules", ()))
    outputs = outputs_of(found.modules)

    def new(site: Site) -> bool:
        names = {*site.path.split(".")}
        head = site.role == "head" and site.path not in outputs and not pretrained & names
        return head or (site.kind == "linear" and bool(fresh & names))

    return [site for site in found.sites if new(site)]


def _connector(modules: Modules, around: dict[str, Record], stacks: list[Stack]) -> list[str]:
    """Return the paths in the connectors between towers, or in what must be a connector."""
    kind = getattr(getattr(modules[""], "config", None), "model_type", None)
    parts = {getattr(stack.config, "model_type", None) for stack in stacks}
    if not around and kind is not None and kind not in parts:
        # Made of parts, without a record: what is not by its name a head joins the parts.
        heads = PRETRAINED_HEADS | {"classifier", "score"}
        bases = _foreign(modules, stacks)
        outer = [path for path in modules if not any(inside(path, base) for base in bases)]
        return [path for path in outer if not heads & {*path.split(".")}]
    roots = [
        root
        for base, record in around.items()
        for pattern in record.connector
        for root in expand(modules, base, pattern)
    ]
    return [p for p in modules if any(p == root or inside(p, root) for root in roots)]


def _connector_site(modules: Modules, path: str) -> Site | None:
    site = site_at(modules, path, "linear", "connector", None)
    return replace(site, role=ROLE_OF[site.kind]) if site else None


def _default_towers(around: dict[str, Record], stacks: list[Stack]) -> tuple[str, ...]:
    """Return the towers that a query without a tower applies to."""
    towers = tuple(dict.fromkeys(stack.tower for stack in stacks))
    for record in around.values():
        if record.default_towers:
            return tuple(t for t in record.default_towers if t in towers) or towers
    # A generator that has another tower beside its text: adapters belong to the text.
    if any(s.tower == "text" and s.flag(s.layout.causal) for s in stacks) and not around:
        return ("text",)
    return towers


def _heads(
    modules: Modules,
    stacks: list[Stack],
    taken: set[str],
    around: dict[str, Record],
    towers: tuple[str, ...],
) -> list[Site]:
    """Return the linears outside all stacks, connectors and parts of another model type."""
    named = {name: tower for record in around.values() for name, tower in record.heads.items()}
    # The decoder's or the text's: the last of the towers that are meant by default.
    usual = [stack.tower for stack in stacks if stack.tower in towers][-1]
    outer = {path for stack in stacks for path in stack.outer}
    inferred = all(stack.inferred for stack in stacks)
    foreign = _foreign(modules, stacks)
    found: list[Site] = []
    for path in modules:
        below = any(inside(path, base) for base in foreign)
        if path in taken or (path not in outer and (below or inferred)):
            continue
        tower = next((named[name] for name in path.split(".") if name in named), usual)
        site = site_at(modules, path, "head", tower, None)
        if site and site.kind in ("linear", "conv1d"):
            found.append(site)
    return found


def _foreign(modules: Modules, stacks: list[Stack]) -> list[str]:
    """Return the modules that are not searched for heads: stacks, and parts of another model type.

    A part that no record describes (the audio tower of an unknown composite, say) must not be
    taken for a head.
    """
    configs = [getattr(modules[""], "config", None), *(stack.config for stack in stacks)]
    own = {getattr(config, "model_type", None) for config in configs} | {None}
    return [stack.path for stack in stacks] + [
        path
        for path, module in modules.items()
        if getattr(getattr(module, "config", None), "model_type", None) not in own
    ]
