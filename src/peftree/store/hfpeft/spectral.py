"""Methods with seeded or structured matrices: VeRA, OFT and FourierFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from peftree.sites.parts import kind_of, width_of
from peftree.store.hfpeft.dialect import AtModules, View, refuse, transposes
from peftree.store.hfpeft.links import InexpressibleError, Link, Part, links_of
from peftree.store.hfpeft.names import targeted
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

    def config(self, view: View) -> dict[str, Any]:
        """Return rank and seed."""
        view.only("linear", "conv1d", whole=True)
        fields: Any = view.method
        return self.targets(view) | transposes(view) | {
            "r": fields.r,
            "projection_prng_key": fields.basis_seed,
            "save_projection": True,
            "vera_dropout": fields.dropout,
            "d_initial": fields.d_initial,
        }  # fmt: skip

    def method(self, config: VeraFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `vera`."""
        return "vera", {
            "sites": self.sites(config, model, where),
            "r": config.r,
            "basis_seed": config.projection_prng_key,
            "dropout": config.vera_dropout,
            "d_initial": config.d_initial,
        }

    def links(self, view: View) -> list[Link]:
        """B and d of every site."""
        view.only("linear", "conv1d", whole=True)
        return links_of(view.entries, lambda _: [Part("vera_lambda_b", ("b",), 0), Part("vera_lambda_d", ("d",))])

    def extras(self, view: View) -> dict[str, Tensor]:
        """The frozen matrices, shared by all sites."""
        bases: Any = view.entries[0][2]._modules["bases"]
        return {"base_model.vera_A": bases.A, "base_model.vera_B": bases.B}


class OftFields(Targeted):
    """OFT's keys; PEFT's default, a series in place of the Cayley map, is no rotation and has no form here."""

    r: int = Field(8, ge=0, le=1 << 20)
    oft_block_size: int = Field(0, ge=0, le=8192)
    module_dropout: float = Field(0.0, ge=0, le=0)
    use_cayley_neumann: Literal[False]
    num_cayley_neumann_terms: Any = 5
    coft: Literal[False] = False
    block_share: Literal[False] = False
    eps: Any = 6e-5
    init_weights: Any = True


class Oft(AtModules[OftFields]):
    """OFT with the exact Cayley map."""

    peft_type: ClassVar[str] = "OFT"
    schema = OftFields
    ours: ClassVar[tuple[str, ...]] = ("oft",)

    def config(self, view: View) -> dict[str, Any]:
        """Return the width of the blocks."""
        view.only("linear")
        blocks = {int(delta.__dict__["block"]) for _, _, delta in view.entries}
        if len(blocks) != 1:
            raise InexpressibleError(f"its blocks have different widths ({', '.join(map(str, sorted(blocks)))})")
        return self.targets(view) | transposes(view) | {
            "r": 0, "oft_block_size": blocks.pop(), "use_cayley_neumann": False, "coft": False, "block_share": False,
            "module_dropout": 0.0,
        }  # fmt: skip

    def method(self, config: OftFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `oft`; every weight must have blocks of one width."""
        paths = targeted(model, config, where)
        widths = set()
        for path in paths:
            module = model.get_submodule(path)
            kind = kind_of(module)
            if kind != "linear":
                raise refuse(where, f"{path} is no linear map")
            wide = width_of(module, kind)[0]
            block = config.oft_block_size or wide // max(1, config.r)
            if not 2 <= block <= wide or wide % block:
                raise refuse(where, f"{path} has {wide} inputs, which blocks of {block} do not divide")
            widths.add(block)
        if len(widths) != 1:
            raise refuse(where, "its blocks have different widths in different modules")
        return "oft", {"sites": self.sites(config, model, where), "block": widths.pop()}

    def links(self, view: View) -> list[Link]:
        """The skew-symmetric entries of every block."""
        return links_of(view.entries, lambda _: [Part("oft_R.weight", ("q",))])


class FourierFields(Targeted):
    """FourierFT's keys."""

    n_frequency: int = Field(1000, ge=1, le=10_000_000)
    n_frequency_pattern: dict[str, int] | None = Field(None, max_length=0)
    scaling: float = Field(150.0, gt=0, le=1e6, allow_inf_nan=False)
    random_loc_seed: int | None = Field(777, ge=0, lt=2**63)
    init_weights: Any = False


class Fourier(AtModules[FourierFields]):
    """FourierFT: the coefficients; their places follow from the seed."""

    peft_type: ClassVar[str] = "FOURIERFT"
    schema = FourierFields
    ours: ClassVar[tuple[str, ...]] = ("fourierft",)

    def config(self, view: View) -> dict[str, Any]:
        """Return number, scale and seed."""
        view.only("linear", "conv1d", whole=True)
        fields: Any = view.method
        if any(fields.n > site.in_features * site.out_features for _, site, _ in view.entries):
            raise InexpressibleError(f"a weight has fewer than n={fields.n} entries")
        return self.targets(view) | transposes(view) | {
            "n_frequency": fields.n,
            "scaling": fields.alpha,
            "random_loc_seed": fields.basis_seed,
            "init_weights": True,
        }  # fmt: skip

    def method(self, config: FourierFields, model: nn.Module, where: Path) -> tuple[str, dict[str, Any]]:
        """Return `fourierft`."""
        if config.random_loc_seed is None:
            raise refuse(where, "random_loc_seed is missing, so the places of its coefficients are unknown")
        return "fourierft", {
            "sites": self.sites(config, model, where),
            "n": config.n_frequency,
            "alpha": config.scaling,
            "basis_seed": config.random_loc_seed,
        }

    def links(self, view: View) -> list[Link]:
        """The coefficients of every weight."""
        view.only("linear", "conv1d", whole=True)
        return links_of(view.entries, lambda _: [Part("fourierft_spectrum", ("c",))])
