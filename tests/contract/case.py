"""A case of the contract's checks: one method on one tiny model, and what the checks compare with."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import peftree
import zoo
from peftree import registry, sites
from peftree.errors import SiteError
from peftree.methods.contract import Method


@cache
def base_of(model: str) -> nn.Module:
    return zoo.build(model).eval()


@dataclass
class Case:
    """One method on one tiny model.

    Attributes:
        method: the method with its fields.
        model: a key of `zoo.CORE`, or a family of `zoo.ZOO`.
    """

    method: Method
    model: str
    batch: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.key = zoo.CORE.get(self.model, self.model)
        self.batch = zoo.batch(self.key)

    @property
    def tags(self) -> Any:
        return type(self.method).tags

    def base(self) -> nn.Module:
        """A fresh copy of the frozen base model, eval mode."""
        base = base_of(self.key)
        # Most of what a module holds are empty tables of hooks; copied beforehand, a copy takes a third of the time.
        held = (value for module in base.modules() for value in vars(module).values())
        empty = {id(value): type(value)() for value in held if isinstance(value, dict | set) and not value}
        return copy.deepcopy(base, empty).requires_grad_(False)

    def adapted(self, shaken: bool = False, name: str = "a", seed: int = 0) -> tuple[nn.Module, Any]:
        """A fresh adapted model in eval mode; `shaken`: moved away from the start."""
        model = self.base()
        adapter = peftree.adapt(model, self.method, name=name, seed=seed)
        if self.tags.needs_data:
            adapter.init([lambda: self.loss(model)])
        if shaken:
            shake(adapter)
        return model.eval(), adapter

    def optimizer(self, adapter: Any, rate: float) -> torch.optim.Optimizer:
        """The method's own optimizer, or AdamW."""
        groups = adapter.param_groups(rate)
        return adapter.optimizer(rate, weight_decay=0.0) or torch.optim.AdamW(groups, weight_decay=0)

    def run(self, model: nn.Module) -> Tensor:
        """The model's main output, without a graph."""
        with torch.no_grad():
            return zoo.output(self.key, model(**self.batch))

    def loss(self, model: nn.Module) -> Tensor:
        """A loss that depends on the whole output."""
        out = model(**self.batch)
        found = getattr(out, "loss", None)
        return zoo.output(self.key, out).float().square().mean() if found is None else found


def small(name: str, model: str) -> Case:
    """The method `name` with the fields with which it fits small models."""
    return Case(registry.make(name, dict(registry.get(name).tags.small)), model)


def fits(case: Case) -> bool:
    """Whether the model has the sites that every part of the method asks for; if not, it must be refused."""
    try:
        return all(sites.resolve(base_of(case.key), part.sites, part.layers) for part in case.method.parts())
    except SiteError:
        return False


def shake(adapter: Any, std: float = 0.05, seed: int = 7) -> None:
    """Move every trainable tensor away from its start, the same way each time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every base tensor, copied; names of grafted ones are left out."""
    return {k: v.clone() for k, v in model.state_dict().items() if ".deltas." not in f".{k}"}


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor], why: str) -> None:
    changed = [k for k in before if k not in after or not torch.equal(before[k], after[k])]
    assert list(before) == list(after) and not changed, f"{why}: {changed[:3]}"


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    scale = max(1.0, float(b.abs().max()))
    return float((a - b).abs().max()) <= tolerance * scale


def moved(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-7
