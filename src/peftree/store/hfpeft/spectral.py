"""Methods with seeded or structured matrices: VeRA, OFT and FourierFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from peftree.store.hfpeft.dialect import AtModules, View, refuse, transposes
from peftree.store.hfpeft.links import InexpressibleError, Part
from peftree.store.hfpeft.names import compact, targeted, usual
from peftree.store.hfpeft.pattern import valued
from peftree.store.hfpeft.schema import Targeted


class VeraFields(Targeted):
    """VeRA's keys."""

    r: int = Field(256, ge=1, le=65536)
    projection_prng_key: int = Field(0, ge=0, lt=2**63)
    save_projection: bool = True
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    d_initial: float = Field(0.1, ge=-1e3, le=1e3)
    init_weights: Any = True


class Vera(AtModules[VeraFields]):
    """VeRA: the trained vectors, and the frozen matrices that their seed gives."""

    peft_type: ClassVar[str] = "VERA"
    schema = VeraFields
    ours: ClassVar[tuple[str, ...]] = ("vera",)
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    whole: ClassVar[bool] = True
    keys: ClassVar[Mapping[str, str]] = {
        "r": "r", "projection_prng_key": "basis_seed", "vera_dropout": "dropout", "d_initial": "d_initial",
    }  # fmt: skip
    parts: ClassVar[tuple[Part, ...]] = (Part("vera_lambda_b", ("b",), 0), Part("vera_lambda_d", ("d",)))

    def config(self, view: View) -> dict[str, Any]:
        """Return rank and seed."""
        return super().config(view) | transposes(view) | {"save_projection": True}

    def extras(self, view: View) -> dict[str, Tensor]:
        """The frozen matrices, shared by all sites."""
        bases: Any = view.entries[0][2]._modules["bases"]
        return {"base_model.vera_A": bases.A, "base_model.vera_B": bases.B}


class OftFields(Targeted):
    """OFT's keys."""

    r: int = Field(8, ge=0, le=1 << 20)
    oft_block_size: int = Field(0, ge=0, le=8192)
    module_dropout: float = Field(0.0, ge=0, le=0)
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = Field(5, ge=1, le=64)
    coft: bool = False
    block_share: bool = False
    eps: float = Field(6e-5, gt=0, le=1e6, allow_inf_nan=False)
    init_weights: Any = True


class Oft(AtModules[OftFields]):
    """OFT, by the exact Cayley map or by a series, which is PEFT's default and turns the other way."""

    peft_type: ClassVar[str] = "OFT"
    schema = OftFields
    ours: ClassVar[tuple[str, ...]] = ("oft",)
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    keys: ClassVar[Mapping[str, str]] = {"r": "blocks", "block_share": "shared"}
    parts: ClassVar[tuple[Part, ...]] = (Part("oft_R.weight", ("q",)),)

    def config(self, view: View) -> dict[str, Any]:
        """Return the width or number of the blocks and the form of the rotation."""
        fields: Any = view.method
        if fields.terms == 3:
            raise InexpressibleError("PEFT uses a series of four terms when asked for three")
        return super().config(view) | transposes(view) | {
            "oft_block_size": 0 if fields.blocks else fields.block,
            "use_cayley_neumann": fields.terms > 0,
            "num_cayley_neumann_terms": fields.terms or 5,
            "coft": fields.eps > 0,
            "eps": fields.eps or 6e-5,
            "module_dropout": 0.0,
        }  # fmt: skip

    def method(self, config: OftFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `oft`; one of the number of blocks and their width is 0."""
        if (config.r == 0) == (config.oft_block_size == 0):
            raise refuse(where, "exactly one of r and oft_block_size must be 0", "Correct the file.")
        terms = {3: 4}.get(config.num_cayley_neumann_terms, config.num_cayley_neumann_terms)  # as PEFT's loop runs
        name, fields = super().method(config, model, where)
        return name, fields | {
            "block": config.oft_block_size or 32,
            "terms": terms if config.use_cayley_neumann else 0,
            "eps": config.eps if config.coft else 0.0,
        }


class FourierFields(Targeted):
    """FourierFT's keys."""

    n_frequency: int = Field(1000, ge=1, le=10_000_000)
    n_frequency_pattern: dict[str, int] | None = None
    scaling: float = Field(150.0, gt=0, le=1e6, allow_inf_nan=False)
    random_loc_seed: int | None = Field(777, ge=0, lt=2**63)
    init_weights: Any = False


class Fourier(AtModules[FourierFields]):
    """FourierFT: the coefficients; their places follow from the seed."""

    peft_type: ClassVar[str] = "FOURIERFT"
    schema = FourierFields
    ours: ClassVar[tuple[str, ...]] = ("fourierft",)
    sited: ClassVar[tuple[str, ...] | None] = ("n",)
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")
    whole: ClassVar[bool] = True
    keys: ClassVar[Mapping[str, str]] = {"scaling": "alpha", "random_loc_seed": "basis_seed"}
    parts: ClassVar[tuple[Part, ...]] = (Part("fourierft_spectrum", ("c",)),)

    def config(self, view: View) -> dict[str, Any]:
        """Return numbers, scale and seed."""
        found = super().config(view) | transposes(view)
        numbers = {site.path: int(view.at(site).n) for _, site, _ in view.entries}
        for _, site, _ in view.entries:
            if numbers[site.path] > site.in_features * site.out_features:
                raise InexpressibleError(f"a weight has fewer than n={numbers[site.path]} entries")
        common, rest = usual(numbers)
        return found | {"n_frequency": common, "n_frequency_pattern": rest, "init_weights": True}

    def method(self, config: FourierFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `fourierft`."""
        if config.random_loc_seed is None:
            raise refuse(where, "random_loc_seed is missing, so the places of its coefficients are unknown")
        paths = targeted(model, config, where)
        numbers = {p: int(valued(config.n_frequency_pattern, p, config.n_frequency)) for p in paths}
        rest = {p: n for p, n in numbers.items() if n != config.n_frequency}
        name, fields = super().method(config, model, where)
        by_site = {" ".join(names): n for names, n in compact(model, rest, paths)}
        return name, fields | {"n": {"*": config.n_frequency} | by_site}
