"""A place: one site with its frozen tensors, as a method's `build` sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftree.deltas.verbs import Frozen
from peftree.errors import MethodError
from peftree.sites import Site

T = TypeVar("T")


def read(module: nn.Module, site: Site) -> Frozen:
    """Return the frozen weight of `site` as `[out, in]` (views, never copies) and its bias.

    Transposed linears, embeddings (`out` = width, `in` = vocabulary), convolutions (`in` = channels x kernel area),
    fused projections (row slices) and norms (`[d]`; `1 + w` where the model multiplies by that) all look alike.
    """
    W: Tensor = module._parameters[site.parameter]  # type: ignore[assignment]
    b: Tensor | None = module._parameters.get(site.bias) if site.bias else None
    if site.kind in ("conv1d", "embedding"):
        W = W.t()
    elif site.kind == "conv2d":
        W = W.flatten(1)
    elif site.unit_offset:
        W = W + 1
    if site.rows is not None:
        W = W[..., site.rows[0] : site.rows[1], :]
        b = None if b is None else b[site.rows[0] : site.rows[1]]
    return Frozen(W, b)


class Place:
    """One site of an adapter under construction.

    Attributes:
        site: the site (names, widths, kind).
        module: the frozen module.
        peers: the sites of the whole adapter part, in model order.
    """

    def __init__(self, site: Site, module: nn.Module, peers: Sequence[Site], memo: dict[str, Any]) -> None:
        self.site = site
        self.module = module
        self.peers = peers
        self._memo = memo

    @property
    def frozen(self) -> Frozen:
        """The frozen weight and bias (views; detached from any graph)."""
        with torch.no_grad():
            return read(self.module, self.site)

    @property
    def device(self) -> torch.device:
        """Device of the base model's tensors here."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """float32 unless the base is float64: adapters of a half precision base keep float32 values."""
        base = next(p.dtype for p in self.module.parameters())
        return base if base == torch.float64 else torch.float32

    @property
    def abstract(self) -> bool:
        """True on the meta device, where tensors have shapes and no values."""
        return self.device.type == "meta"

    @property
    def embedding(self) -> Tensor | None:
        """The token embedding table `[vocabulary, d]` of a text stack, else None."""
        names = [self.site.embed] if self.site.embed is not None else []
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Embedding) and any(f".{n}".endswith(f".{name}") for n in names):
                return module.weight.detach()
        return None

    @property
    def index(self) -> int:
        """Rank of this site among its peers, from 0: stable across runs, for seeds."""
        return self.peers.index(self.site)

    def refuse(self, why: str, instead: str) -> MethodError:
        """Return the error to raise where a method does not fit this place; `why` follows the site's name."""
        return MethodError(f"{self.site.name} ({self.site.path}) {why}.", instead)

    def empty(self, *shape: int) -> nn.Parameter:
        """Return an uninitialised trainable tensor on the right device and dtype."""
        return nn.Parameter(torch.empty(*shape, device=self.device, dtype=self.dtype))

    def zeros(self, *shape: int) -> nn.Parameter:
        """Return a trainable tensor of zeros."""
        return nn.Parameter(torch.zeros(*shape, device=self.device, dtype=self.dtype))

    def ones(self, *shape: int) -> nn.Parameter:
        """Return a trainable tensor of ones."""
        return nn.Parameter(torch.ones(*shape, device=self.device, dtype=self.dtype))

    def normal(self, *shape: int, std: float = 0.02, mean: float = 0.0) -> nn.Parameter:
        """Return a trainable tensor drawn from N(mean, std)."""
        return nn.Parameter(torch.nn.init.normal_(self.empty(*shape).detach(), mean, std))

    def kaiming(self, *shape: int) -> nn.Parameter:
        """Return a trainable tensor drawn as `nn.Linear` draws its weight: Kaiming uniform with a = sqrt(5)."""
        bound = shape[-1] ** -0.5
        return nn.Parameter(torch.nn.init.uniform_(self.empty(*shape).detach(), -bound, bound))

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Return `make()` of the first call with this key: what all deltas of the adapter share."""
        if key not in self._memo:
            self._memo[key] = make()
        value: T = self._memo[key]
        return value

    def apart(self, key: str) -> Place:
        """Return this place for one of several adapters that are built together: `once` is each one's own there."""
        return Place(self.site, self.module, self.peers, self.once(f"apart {key}", dict))
