"""Methods that change scales and shifts: LayerNorm tuning and (IA)^3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftree import sites as site_tree
from peftree.deltas import ScaledInput
from peftree.deltas.place import read
from peftree.making import Entries
from peftree.store.hfpeft.dialect import AtModules, View, refuse
from peftree.store.hfpeft.links import InexpressibleError, Link, Part, links_of
from peftree.store.hfpeft.names import literal, shortest, targeted
from peftree.store.hfpeft.schema import Targeted


class Norms(AtModules[Targeted]):
    """LayerNorm tuning: PEFT keeps the trained parameters themselves, we keep their distance from the base."""

    peft_type: ClassVar[str] = "LN_TUNING"
    schema = Targeted
    ours: ClassVar[tuple[str, ...]] = ("layernorm",)
    kinds: ClassVar[tuple[str, ...]] = ("norm",)

    def config(self, view: View) -> dict[str, Any]:
        """Return the targets; refuse values that would not come back as the same parameters, bit for bit."""
        found = super().config(view)
        for _, site, delta in view.entries:
            base = read(view.model.get_submodule(site.path), site)
            for frozen, change in (
                (base.weight, delta._parameters.get("value")),
                (base.bias, delta._parameters.get("offset")),
            ):
                if frozen is not None and change is not None and not _returns(frozen.float(), change.detach()):
                    raise InexpressibleError(f"the sum of base and change at {site.name} cannot be separated again")
        return found

    def links(self, view: View) -> list[Link]:
        """Weight and bias of every norm."""
        return links_of(view.entries, lambda members: _norm(view, members))


def _returns(frozen: Tensor, change: Tensor) -> bool:
    whole = frozen + change
    return bool((frozen + (whole - frozen) == whole).all())


def _norm(view: View, members: Entries) -> Sequence[Part]:
    _, site, _ = members[0]
    base = read(view.model.get_submodule(site.path), site)
    parts = [_sum("ln_tuning_layers.weight", "value", base.weight, 1.0 if site.unit_offset else 0.0)]
    return parts if base.bias is None else [*parts, _sum("ln_tuning_layers.bias", "offset", base.bias, 0.0)]


def _sum(theirs: str, ours: str, frozen: Tensor, offset: float) -> Part:
    def base(like: Tensor) -> Tensor:
        return frozen.detach().to(like.device, like.dtype)

    return Part(theirs, (ours,), None, lambda t: (base(t[0]) + t[0]) - offset, lambda t: [(t + offset) - base(t)])


class Ia3Fields(Targeted):
    """(IA)^3's keys."""

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: Any = True


class Ia3(AtModules[Ia3Fields]):
    """(IA)^3: a column of output scales, or a row of input scales at feed-forward modules."""

    peft_type: ClassVar[str] = "IA3"
    schema = Ia3Fields
    ours: ClassVar[tuple[str, ...]] = ("ia3",)

    def config(self, view: View) -> dict[str, Any]:
        """Return the targets, and those among them whose input is scaled."""
        view.only("linear", "conv1d", "conv")
        inner = {site.path for _, site, delta in view.entries if isinstance(delta, ScaledInput)}
        for targets in (shortest(view.model, view.paths), sorted(view.paths)):
            chosen = [t for t in targets if any(p.endswith(t) for p in inner)]
            if {p for p in view.paths if any(p.endswith(t) for t in chosen)} == inner:
                conv1d = all(site.kind == "conv1d" for _, site, _ in view.entries)
                return {"target_modules": targets, "feedforward_modules": chosen, "fan_in_fan_out": conv1d}
        raise InexpressibleError("the names of its feed-forward modules also match other modules")

    def method(self, config: Ia3Fields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `ia3` with the roles of the feed-forward modules as `columns`."""
        paths = targeted(model, config, where)
        inner = literal(config.feedforward_modules, "feedforward_modules", where)
        sites = self.sites(config, model, where)
        found = site_tree.resolve(model, sites)
        columns = {s.role for s in found if any(s.path.endswith(t) for t in inner)}
        if {s.path for s in found if s.role in columns} != {p for p in paths if any(p.endswith(t) for t in inner)}:
            raise refuse(where, "feedforward_modules has only some modules of a role")
        return "ia3", {"sites": sites, "columns": " ".join(sorted(columns)) or "none"}

    def links(self, view: View) -> list[Link]:
        """The scale of every site."""
        return links_of(view.entries, lambda members: _scale(view, members))


def _scale(view: View, members: Entries) -> Sequence[Part]:
    _, site, delta = members[0]
    if site.kind == "conv":
        return [_channels(view.model.get_submodule(site.path), site.path, isinstance(delta, ScaledInput))]
    if isinstance(delta, ScaledInput):
        return [Part("ia3_l", ("scale",), None, lambda t: t[0].unsqueeze(0), lambda t: [t.squeeze(0)])]
    return [Part("ia3_l", ("scale",), 0, lambda t: t[0].unsqueeze(-1), lambda t: [t.squeeze(-1)])]


def _channels(module: nn.Module, path: str, inner: bool) -> Part:
    """Return the part of a convolution: PEFT has one scale per channel, we have one per input of the kernel."""
    weight: Any = module._parameters["weight"]
    if getattr(module, "groups", 1) > 1:
        raise InexpressibleError(f"{path} is a grouped convolution")
    shape, area = [1, -1, *[1] * (weight.dim() - 2)], weight[0, 0].numel() if inner else 1

    def encode(tensors: Sequence[Tensor]) -> Tensor:
        rows = tensors[0].view(-1, area)
        if not rows.is_meta and not torch.equal(rows, rows[:, :1].expand_as(rows)):
            raise InexpressibleError(f"the scales of {path} differ within a channel")
        return rows[:, 0].reshape(shape)

    return Part("ia3_l", ("scale",), None, encode, lambda t: [t.flatten().repeat_interleave(area)])
