"""LoRA, rsLoRA, PiSSA and DoRA: `lora_A.weight` is our A, `lora_B.weight` our B transposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftree.store.build import Entries
from peftree.store.hfpeft.dialect import AtModules, View, refuse, transposes
from peftree.store.hfpeft.links import InexpressibleError, Link, Part, links_of, reshaped, transposed
from peftree.store.hfpeft.schema import Targeted


class LoraFields(Targeted):
    """LoRA's keys. Those typed None or False change what an adapter computes and have no form here."""

    r: int = Field(8, ge=1, le=65536)
    lora_alpha: float = Field(8.0, gt=0, le=1e6, allow_inf_nan=False)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    lora_bias: Literal[False] = False
    use_qalora: Literal[False] = False
    use_bdlora: Literal[False] | None = None
    layer_replication: None = None
    target_parameters: list[str] | None = Field(None, max_length=0)
    trainable_token_indices: None = None
    alora_invocation_tokens: None = None
    arrow_config: None = None
    kasa_config: None = None
    velora_config: None = None
    monteclora_config: None = None
    megatron_config: None = None
    loftq_config: dict[str, Any] | None = None


_LEAVES_BASE = ("gaussian", "eva", "orthogonal")  # starts that do not change the base; all others do, or may


class Lora(AtModules[LoraFields]):
    """LoRA at linear maps, transposed linear maps, embeddings and convolutions."""

    peft_type: ClassVar[str] = "LORA"
    schema = LoraFields
    ours: ClassVar[tuple[str, ...]] = ("lora",)

    def config(self, view: View) -> dict[str, Any]:
        """PiSSA is written as LoRA of twice the rank, which holds the subtracted start too."""
        view.only("linear", "conv1d", "embedding", "conv2d")
        for _, site, _ in view.entries:
            module = view.model.get_submodule(site.path)
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                raise InexpressibleError(f"{site.path} is a grouped convolution")
            if site.kind == "embedding" and "forward" in _own(module):
                raise InexpressibleError(f"{site.path} is no plain embedding")
        fields: Any = view.method
        double = 2 if fields.start == "pissa" else 1
        return (
            self.targets(view)
            | transposes(view)
            | {
                "r": fields.r * double,
                "lora_alpha": fields.alpha * (double**0.5 if fields.rank_stabilized else double),
                "lora_dropout": fields.dropout,
                "use_rslora": fields.rank_stabilized,
                "init_lora_weights": True,
            }
        )

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """Return whether the config is of plain LoRA."""
        return not raw.get("use_dora")

    def method(self, config: LoraFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `lora` with the config's fields."""
        check_start(config, where)
        fields = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        return "lora", fields | {"rank_stabilized": config.use_rslora, "sites": self.sites(config, model, where)}

    def links(self, view: View) -> list[Link]:
        """A and B, and for PiSSA their frozen start joined to them."""
        return links_of(view.entries, lambda members: _parts(view, members))


def check_start(config: LoraFields, where: Path) -> None:
    """Raise StoreError if the adapter needs a changed base or different ranks in different places."""
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower() not in _LEAVES_BASE:
        raise refuse(
            where,
            f"init_lora_weights={start[:40]!r} may mean that its tensors belong to a changed base",
            "Save it from peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
        )
    if config.rank_pattern or config.alpha_pattern:
        raise refuse(where, "it has different ranks or alphas in different modules (rank_pattern, alpha_pattern)")


class Dora(AtModules[LoraFields]):
    """DoRA at linear maps: LoRA's tensors and the magnitude."""

    peft_type: ClassVar[str] = "LORA"
    schema = LoraFields
    ours: ClassVar[tuple[str, ...]] = ("dora",)

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """Return whether the config is of DoRA."""
        return raw.get("use_dora") is True

    def config(self, view: View) -> dict[str, Any]:
        """Return LoRA's keys with `use_dora`."""
        view.only("linear", "conv1d")
        fields: Any = view.method
        own = {"r": fields.r, "lora_alpha": fields.alpha, "lora_dropout": fields.dropout}
        return self.targets(view) | transposes(view) | own | {"use_dora": True, "init_lora_weights": True}

    def method(self, config: LoraFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `dora`; a scale of alpha / sqrt(r) is that of alpha sqrt(r) over r."""
        check_start(config, where)
        alpha = config.lora_alpha * (config.r**0.5 if config.use_rslora else 1.0)
        fields = {"r": config.r, "alpha": alpha, "dropout": config.lora_dropout}
        return "dora", fields | {"sites": self.sites(config, model, where)}

    def links(self, view: View) -> list[Link]:
        """A, B and the magnitude of every output unit."""
        parts = [Part("lora_A.weight", ("A",)), transposed("lora_B.weight", "B")]
        return links_of(view.entries, lambda _: [*parts, Part("lora_magnitude_vector", ("g",), 0)])


def _parts(view: View, members: Entries) -> Sequence[Part]:
    _, site, delta = members[0]
    fields: Any = view.method
    r = fields.r
    if "A0" in delta._buffers:
        if site.kind not in ("linear", "conv1d"):
            raise InexpressibleError(f"PiSSA at {site.name} is no LoRA of twice the rank there")
        return _doubled(r)
    if site.kind == "embedding":
        return [Part("lora_embedding_A", ("A",)), transposed("lora_embedding_B", "B")]
    if site.kind == "conv2d":
        module: Any = view.model.get_submodule(site.path)
        kernel = (r, module.in_channels, *module.kernel_size)
        out = site.out_features
        split = Part(
            "lora_B.weight", ("B",), 0, lambda t: t[0].mT.reshape(out, r, 1, 1), lambda t: [t.reshape(out, r).mT]
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


def _own(module: nn.Module) -> dict[str, Any]:
    """Return what the module's own class defines beyond `nn.Embedding`."""
    mro = type(module).__mro__
    above = mro[: mro.index(nn.Embedding)] if nn.Embedding in mro else ()
    return {k: v for cls in above if not cls.__name__.startswith("Adapted") for k, v in vars(cls).items()}
