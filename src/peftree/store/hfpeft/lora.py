"""LoRA, rsLoRA, PiSSA and DoRA: `lora_A.weight` is our A, `lora_B.weight` our B transposed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftree import registry
from peftree.making import Entries
from peftree.methods.contract import Method
from peftree.sites import Site
from peftree.sites.parts import modules_of
from peftree.store.hfpeft.dialect import AtModules, View, refuse, transposes
from peftree.store.hfpeft.links import InexpressibleError, Link, Part, links_of, reshaped, transposed
from peftree.store.hfpeft.names import compact, matches, query, shortest, targeted, usual
from peftree.store.hfpeft.pattern import valued
from peftree.store.hfpeft.schema import Targeted


class LoraFields(Targeted):
    """LoRA's keys. Those typed None or False change what an adapter computes and are not supported here."""

    r: int = Field(8, ge=1, le=65536)
    lora_alpha: float = Field(8.0, gt=0, le=1e6, allow_inf_nan=False)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    lora_bias: bool = False
    use_qalora: Literal[False] = False
    use_bdlora: Literal[False] | None = None
    layer_replication: None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | list[int] | None = Field(None, exclude=True)
    alora_invocation_tokens: None = None
    arrow_config: None = None
    kasa_config: None = None
    velora_config: None = None
    monteclora_config: None = None
    megatron_config: None = None
    loftq_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False


# Starts that leave the base as it is, and those that take what they start with out of it, in a way that is known.
_LEAVES_BASE = ("gaussian", "eva", "orthogonal", "mica")
_TAKES = {"pissa": "pissa", "olora": "olora"}


class Low(AtModules[LoraFields]):
    """What LoRA and DoRA share: places with their ranks and scales."""

    peft_type: ClassVar[str] = "LORA"
    schema = LoraFields
    sited: ClassVar[tuple[str, ...] | None] = None

    def fields(self, config: LoraFields, model: nn.Module, where: Path) -> dict[str, Any]:
        """Return the places, rank, scale and dropout of a config, by site where they differ.

        Raises:
            StoreError: a place or a scale is not clear.
        """
        paths = [] if config.target_modules == [] and config.target_parameters else targeted(model, config, where)
        experts = _parameters(model, config.target_parameters or [], where)
        if config.ensure_weight_tying:
            paths = [n for n in modules_of(model) if n in paths or (n in config.tensors() and n not in experts)]
        terms = [f"{path}.{name}" for path, names in experts.items() for name in names]
        every = [*paths, *terms]
        ranks = {p: _rank(config, model, p, experts) for p in every}
        alphas = {p: valued(config.alpha_pattern, p, config.lora_alpha) for p in every}
        sites = query(model, paths, where) if paths and not terms else " ".join(every)
        found: dict[str, Any] = {"sites": sites, "dropout": config.lora_dropout}
        for name, values in (("r", ranks), ("alpha", alphas)):
            common, rest = usual(values)
            found[name] = {"*": common} | {" ".join(n): v for n, v in compact(model, rest, every)}
        return found

    def shared(self, view: View) -> dict[str, Any]:
        """Return PEFT's keys of places, ranks, scales and dropout.

        Raises:
            InexpressibleError: the dropout differs between sites, or a place has no name of its own in PEFT.
        """
        experts = [(site, delta) for _, site, delta in view.entries if site.kind == "expert"]
        parameters = [f"{site.path}.{site.parameter}" for site, _ in experts]
        paths = [p for p in view.paths if p not in {site.path for site, _ in experts}]
        found: dict[str, Any] = {"target_modules": shortest(view.model, paths) if paths else []}
        if experts:
            found["target_parameters"] = parameters
        fields = {_name(site): view.at(site) for _, site, _ in view.entries}
        every = list(fields)
        if len({f.dropout for f in fields.values()}) > 1 or (experts and any(f.dropout for f in fields.values())):
            raise InexpressibleError("its dropout differs between its sites, or is at stacked experts")
        stable = {getattr(f, "rank_stabilized", False) for f in fields.values()}
        ranks = {n: f.r for n, f in fields.items()}
        mixed = len(stable) > 1
        alphas = {n: f.alpha * (f.r**0.5 if mixed and f.rank_stabilized else 1.0) for n, f in fields.items()}
        for one, more, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
            common, rest = usual(values)
            found[one] = common
            if rest:
                found[more] = {name: v for names, v in compact(view.model, rest, every) for name in names}
                if any(valued(found[more], n, common) != v for n, v in values.items()):
                    found[more] = {"^" + re.escape(n): v for n, v in rest.items()}
        found["use_rslora"] = stable == {True}
        found["lora_dropout"] = next(iter(fields.values())).dropout
        return found | transposes(view)


def _name(site: Site) -> str:
    return f"{site.path}.{site.parameter}" if site.kind == "expert" else site.path


def _parameters(model: nn.Module, targets: Sequence[str], where: Path) -> dict[str, list[str]]:
    """Return the parameters that `target_parameters` means, by module, in the order in which PEFT wraps them."""
    found: dict[str, list[str]] = {}
    for path, module in modules_of(model).items():
        names = [n for n, p in module._parameters.items() if p is not None]
        mine = [n for n in names if any(matches(f"{path}.{n}", t) for t in targets)]
        if mine:
            found[path] = mine
    if targets and not found:
        raise refuse(where, f"no parameter of this model matches target_parameters: {targets[0][:80]!r}")
    return found


def _rank(config: LoraFields, model: nn.Module, place: str, experts: Mapping[str, Sequence[str]]) -> int:
    """Return the rank at a place: the config's where its patterns can be read, else what the tensors have."""
    try:
        return int(valued(config.rank_pattern, place, config.r))
    except InexpressibleError:
        path, _, name = place.rpartition(".")
        if path in experts and name in experts[path]:
            raise
        shapes = config.tensors().get(place, {})
        found = next((shapes[n][0] for n in ("lora_A.weight", "lora_embedding_A") if shapes.get(n)), 0)
        if found not in {config.r, *(config.rank_pattern or {}).values()}:
            raise
        return found


class Lora(Low):
    """LoRA at linear maps, transposed linear maps, embeddings, convolutions and stacked experts."""

    ours: ClassVar[tuple[str, ...]] = ("lora",)
    derived: ClassVar[tuple[str, ...]] = ("A0", "B0")

    def config(self, view: View) -> dict[str, Any]:
        """PiSSA is written as LoRA of twice the rank, which also holds the subtracted start."""
        view.only("linear", "conv1d", "embedding", "conv", "expert")
        for _, site, _ in view.entries:
            module = view.model.get_submodule(site.path)
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
                raise InexpressibleError(f"{site.path} is a grouped convolution")
            if site.kind == "expert" and (site.split or module.get_parameter(site.parameter).ndim == 2):
                raise InexpressibleError(f"{site.path} is a linear map of a custom class")
            if site.kind == "embedding" and "forward" in _own(module) and "embed_scale" not in _held(module):
                raise InexpressibleError(f"{site.path} is not a plain embedding")
        fields: Any = view.method
        found = self.shared(view) | {"init_lora_weights": True, "lora_bias": bool(view.shifts)}
        if fields.start in _TAKES.values():
            found["r"] *= 2
            found["lora_alpha"] *= 2**0.5 if found["use_rslora"] else 2
            for key, times in (("rank_pattern", 2), ("alpha_pattern", 2**0.5 if found["use_rslora"] else 2)):
                found |= {key: {n: v * times for n, v in found[key].items()}} if key in found else {}
        return found

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """Return whether the config is of plain LoRA."""
        return not raw.get("use_dora")

    def method(self, config: LoraFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `lora` with the config's fields."""
        start = check_start(config, where)
        return "lora", self.fields(config, model, where) | {"rank_stabilized": config.use_rslora, "start": start}

    def beside(self, config: LoraFields, method: Method) -> list[Method]:
        """Return a part of trained biases for `lora_bias`."""
        return [registry.make("bitfit", {"sites": method.sites})] if config.lora_bias else []

    def links(self, view: View) -> list[Link]:
        """A and B, and for PiSSA their frozen start joined to them."""
        experts = [e for e in view.entries if e[1].kind == "expert"]
        rest = [e for e in view.entries if e[1].kind != "expert"]
        scales = {e[1].path: e[2].__dict__["scale"] for e in rest}
        found = links_of(rest, lambda members: _parts(view, members))
        found += links_of(view.shifts, lambda members: [_shift(scales, members)])
        return found + _expert_links(view, experts)


def _shift(scales: Mapping[str, float], members: Entries) -> Part:
    site = members[0][1]
    if site.path not in scales:
        raise InexpressibleError(f"the bias of {site.path} is trained, but no low-rank term is there")
    s = scales[site.path]
    return Part("lora_B.bias", ("db",), 0, lambda t: t[0] / s, lambda t: [t * s])


def _expert_links(view: View, entries: Entries) -> list[Link]:
    """Return the links at stacked experts: PEFT wraps one parameter of a module around the other."""
    found: list[Link] = []
    for path in dict.fromkeys(site.path for _, site, _ in entries):
        module = view.model.get_submodule(path)
        mine = [e for e in entries if e[1].path == path]
        names = [n for n in reversed(module._parameters) if any(e[1].parameter == n for e in mine)]
        for depth, name in enumerate(names):
            members = [e for e in mine if e[1].parameter == name]
            found += links_of(members, partial(_expert_parts, bool(_held(module).get("is_transposed")), depth))
    return found


def _expert_parts(turned: bool, depth: int, members: Entries) -> Sequence[Part]:
    n, r, _ = members[0][2].get_parameter("A").shape
    before = "base_layer." * depth
    if turned and len(members) > 1:
        raise InexpressibleError(f"{members[0][1].path} has parts of a fused projection that is transposed in PEFT")
    first, second = ("B", "A") if turned else ("A", "B")
    return [
        Part(
            f"{before}lora_A.weight", (first,), None,
            lambda t: t[0].flatten(0, 1), lambda t: [t.reshape(n, r, -1)],
        ),
        Part(
            f"{before}lora_B.weight", (second,), 0,
            lambda t: t[0].permute(2, 1, 0).flatten(1), lambda t: [t.reshape(-1, r, n).permute(2, 1, 0)],
        ),
    ]  # fmt: skip


def check_start(config: LoraFields, where: Path) -> str:
    """Return our name of a start that is subtracted from the base, else `zero`; raise StoreError if it is unclear."""
    start = config.init_lora_weights
    name = start.lower() if isinstance(start, str) else ""
    if name in _TAKES and not config.use_dora:
        return _TAKES[name]
    if name and name not in _LEAVES_BASE:
        raise refuse(
            where,
            f"init_lora_weights={name[:40]!r} may mean that its tensors belong to a changed base",
            "Save it from peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )
    return "zero"


class Dora(Low):
    """DoRA at linear maps and convolutions: LoRA's tensors and the magnitude."""

    ours: ClassVar[tuple[str, ...]] = ("dora",)

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """Return whether the config is of DoRA."""
        return raw.get("use_dora") is True

    def config(self, view: View) -> dict[str, Any]:
        """Return LoRA's keys with `use_dora`."""
        view.only("linear", "conv1d", "conv", "embedding")
        if view.shifts:
            raise InexpressibleError("biases of a decomposed weight are trained")
        return self.shared(view) | {"use_dora": True, "init_lora_weights": True}

    def method(self, config: LoraFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `dora`; a scale of alpha / sqrt(r) is that of alpha sqrt(r) over r."""
        check_start(config, where)
        if config.lora_bias:
            raise refuse(where, "biases of a decomposed weight are trained (lora_bias)")
        fields = self.fields(config, model, where)
        if config.use_rslora:
            ranks = fields["r"]
            if len(ranks) + len(fields["alpha"]) > 2:
                raise refuse(where, "ranks or scales differ between modules of a stabilized DoRA")
            fields["alpha"] = {"*": fields["alpha"]["*"] * ranks["*"] ** 0.5}
        return "dora", fields

    def links(self, view: View) -> list[Link]:
        """A, B and the magnitude of every output unit."""
        return links_of(view.entries, lambda members: [*_parts(view, members), _magnitude(view, members[0][1])])


def _magnitude(view: View, site: Site) -> Part:
    if site.kind == "conv":
        module: Any = view.model.get_submodule(site.path)
        ones = (1,) * len(module.kernel_size)
        return reshaped("lora_magnitude_vector", "g", (1, -1, *ones), (-1,), 1)
    return Part("lora_magnitude_vector", ("g",), 0)


def _parts(view: View, members: Entries) -> Sequence[Part]:
    _, site, delta = members[0]
    r = delta.get_parameter("A").shape[0]
    if "A0" in delta._buffers and view.config is None:
        if site.kind not in ("linear", "conv1d"):
            raise InexpressibleError(f"PiSSA at {site.name} is not a LoRA of twice the rank in PEFT")
        return _doubled(r)
    if site.kind == "embedding":
        return [Part("lora_embedding_A", ("A",)), transposed("lora_embedding_B", "B")]
    if site.kind == "conv":
        module: Any = view.model.get_submodule(site.path)
        kernel = (r, module.in_channels // module.groups, *module.kernel_size)
        out, ones = site.out_features, (1,) * len(module.kernel_size)
        split = Part(
            "lora_B.weight", ("B",), 0, lambda t: t[0].mT.reshape(out, r, *ones), lambda t: [t.reshape(out, r).mT]
        )
        return [reshaped("lora_A.weight", "A", kernel, (r, site.in_features)), split]
    return [Part("lora_A.weight", ("A",)), transposed("lora_B.weight", "B")]


def _doubled(r: int) -> Sequence[Part]:
    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensors[0], -tensors[1]]).mT

    return [
        Part("lora_A.weight", ("A", "A0"), None, torch.cat, lambda t: [t[:r], t[r:]]),  # type: ignore[arg-type]
        Part("lora_B.weight", ("B", "B0"), 0, joined, lambda t: [t.mT[:r], -t.mT[r:]]),
    ]


def _held(module: nn.Module) -> dict[str, Any]:
    return {**module.__dict__, **module._buffers}


def _own(module: nn.Module) -> dict[str, Any]:
    """Return what the module's class defines beyond `nn.Embedding`."""
    mro = type(module).__mro__
    above = mro[: mro.index(nn.Embedding)] if nn.Embedding in mro else ()
    return {k: v for cls in above if not cls.__name__.startswith("Adapted") for k, v in vars(cls).items()}
