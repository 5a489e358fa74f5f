"""AdaLoRA: `lora_A` is our Q, `lora_B` our P transposed, `lora_E` our E as a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftree.making import Entries
from peftree.store.hfpeft.dialect import AtModules, View, refuse, transposes
from peftree.store.hfpeft.links import Link, Part, links_of
from peftree.store.hfpeft.schema import Targeted

STEPS = 1000  # PEFT counts steps where our schedule has shares; it must have some number


class AdaLoraFields(Targeted):
    """AdaLoRA's keys."""

    init_r: int = Field(12, ge=1, le=65536)
    target_r: int = Field(8, ge=1, le=65536)
    lora_alpha: float = Field(8.0, gt=0, le=1e6, allow_inf_nan=False)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    tinit: int = Field(0, ge=0)
    tfinal: int = Field(0, ge=0)
    deltaT: int = Field(1, ge=1, le=1_000_000)  # noqa: N815  (PEFT's name)
    beta1: float = Field(0.85, gt=0, lt=1)
    beta2: float = Field(0.85, gt=0, lt=1)
    orth_reg_weight: float = Field(0.5, ge=0, le=1e3)
    total_step: int | None = Field(None, ge=1)
    rank_pattern: dict[str, list[bool]] | None = None
    use_dora: Literal[False] = False
    use_rslora: bool = False
    lora_bias: Literal[False] = False


class AdaLora(AtModules[AdaLoraFields]):
    """AdaLoRA at linear maps."""

    peft_type: ClassVar[str] = "ADALORA"
    schema = AdaLoraFields
    ours: ClassVar[tuple[str, ...]] = ("adalora",)
    rest: ClassVar[tuple[str, ...]] = ("alive",)
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    keys: ClassVar[Mapping[str, str]] = {
        "init_r": "r", "target_r": "target_r", "lora_alpha": "alpha", "lora_dropout": "dropout", "deltaT": "interval",
        "beta1": "beta", "orth_reg_weight": "orthogonal",
    }  # fmt: skip

    def config(self, view: View) -> dict[str, Any]:
        """Return rank, scale and schedule."""
        fields: Any = view.method
        warmup, final = round(fields.warmup * STEPS), round(fields.final * STEPS)
        fits = warmup + final < STEPS
        schedule = {"tinit": warmup if fits else 0, "tfinal": final if fits else 0, "total_step": STEPS}
        return super().config(view) | transposes(view) | schedule | {"beta2": fields.beta}

    def method(self, config: AdaLoraFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `adalora`; ranks that PEFT has cut off come back as triplets whose E is 0."""
        steps = config.total_step or 0
        shares = {"warmup": config.tinit / steps, "final": config.tfinal / steps} if steps else {}
        if any(share >= 1 for share in shares.values()):
            raise refuse(where, "tinit or tfinal is not below total_step", "Correct the file.")
        name, fields = super().method(config, model, where)
        return name, fields | shares

    def links(self, view: View) -> list[Link]:
        """Q, E and P of the triplets that are left."""
        kept = view.config.rank_pattern or {} if isinstance(view.config, AdaLoraFields) else {}
        masks = {name.removesuffix(".lora_E"): mask for name, mask in kept.items()}
        return links_of(view.entries, lambda members: _parts(view, members, masks))


def _parts(view: View, members: Entries, masks: dict[str, list[bool]]) -> Sequence[Part]:
    fields: Any = view.method
    mask = masks.get(members[0][1].path)
    if mask is None or len(mask) != fields.r:
        mask = [True] * int(fields.r)
    rows = torch.tensor([i for i, keep in enumerate(mask) if keep], dtype=torch.long)

    def take(tensor: Tensor) -> Tensor:
        return tensor if all(mask) else tensor[rows.to(tensor.device)]

    def spread(tensor: Tensor) -> Tensor:
        return tensor if all(mask) else tensor.new_zeros(len(mask), *tensor.shape[1:]).index_copy_(0, rows, tensor)

    def values(column: Tensor) -> Sequence[Tensor]:
        return [spread(column.squeeze(-1)), torch.tensor(mask)]

    return [
        Part("lora_A", ("Q",), None, lambda t: take(t[0]), lambda t: [spread(t)]),
        Part("lora_B", ("P",), 0, lambda t: take(t[0]).mT, lambda t: [spread(t.mT)]),
        Part("lora_E", ("E", "alive"), None, lambda t: take(t[0]).unsqueeze(-1), values),
    ]
