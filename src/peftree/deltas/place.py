"""A place: one site with its frozen tensors, as a method's `build` sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftree.deltas.origin import before_packing
from peftree.deltas.packed import dense, is_packed
from peftree.deltas.verbs import Frozen, Part
from peftree.errors import MethodError
from peftree.sites import Site

T = TypeVar("T")


def read(module: nn.Module, site: Site, parameters: Mapping[str, Tensor | None] | None = None) -> Frozen:
    """Return the frozen weight of `site` as `[out, in]` and its bias, from `parameters` in place of the module's own.

    They are views, never copies, but for a packed weight, which every reading unpacks. Transposed linears, embeddings
    (`out` = width, `in` = vocabulary), convolutions (`in` = channels x kernel area), fused projections (row slices) and
    norms (`[d]`; `1 + w` where the model multiplies by that) all look alike. A module without a bias may have one in
    `parameters`, from another delta.
    """
    own: Any = module._parameters if parameters is None else parameters
    W: Tensor = own[site.parameter]
    b: Tensor | None = own.get(site.bias or ("bias" if module._parameters.get("bias") is None else ""))
    if is_packed(W):
        rows = slice(*(site.rows or (None,)))
        return Frozen(lambda: dense(module, W)[rows], None if b is None else b[rows])
    if site.kind in ("conv1d", "embedding"):
        W = W.t()
    elif site.kind == "conv" or site.split:
        W = W.flatten(1).t() if site.split == "out" else W.flatten(1)
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

    def __init__(
        self, site: Site, model: nn.Module, peers: Sequence[Site], memo: dict[str, Any], owner: object = None
    ) -> None:
        self.site = site
        self.module = model.get_submodule(site.path)
        self._model = model
        self.peers = peers
        self._memo = memo
        self._owner = owner  # the method with the fields of this site; equal fields, same object

    @property
    def frozen(self) -> Frozen:
        """The frozen weight and bias (detached from any graph).

        Raises:
            MethodError: the site is a whole branch, layer or stack.
        """
        if self.module._parameters.get(self.site.parameter) is None:
            why = f"is of kind '{self.site.kind}' and has no weight of its own"
            raise self.refuse(why, "Name other sites; `peftree inspect` lists them with their kinds.")
        hook: Any = self.module.__dict__.get("_hf_hook")
        with torch.no_grad():
            if not self.abstract and self.module.get_parameter(self.site.parameter).is_meta:
                held = nn.Module()  # accelerate keeps the values elsewhere until the module runs
                names = [n for n, p in self.module._parameters.items() if p is not None]
                values: Any = {n: hook.weights_map[n].to(self.device) for n in names}
                held._parameters = values
                return read(held, self.site)
            return read(self.module, self.site)

    @property
    def plain(self) -> Tensor | None:
        """The weight of `frozen` as it was before it was packed, read from the files that the model was loaded from.

        None: it is not packed, it has no values, or values are at hand (`filled`).

        Raises:
            MethodError: they do not hold it as it is.
        """
        try:
            W = before_packing(self._model, self.module, self.site, self._memo)
        except LookupError as error:
            raise self.without_plain(str(error)) from None
        return None if W is None else W.to(self.device)

    def without_plain(self, why: str) -> MethodError:
        """Return the error to raise if there is no plain weight to start from; `why` is a sentence's end."""
        fix = "Load the model from its plain safetensors, packed while they are read (quantize=nf4), or set start=zero."
        return self.refuse(f"has no plain weight to start from: {why}", fix)

    @property
    def device(self) -> torch.device:
        """Device of the base model's tensors here; for weights that accelerate offloaded, the device they run on."""
        own = next(self.module.parameters()).device
        if own.type != "meta":
            return own
        hooks: list[Any] = [m.__dict__.get("_hf_hook") for m in self.module.modules()]
        held = [h for h in hooks if getattr(h, "weights_map", None) is not None]
        return torch.device(held[0].execution_device) if held else own

    @property
    def dtype(self) -> torch.dtype:
        """float32 unless the base is float64: adapters of a half-precision base keep float32 values."""
        base = next(p.dtype for p in self.module.parameters())
        return base if base == torch.float64 else torch.float32

    @property
    def abstract(self) -> bool:
        """True on the meta device, where tensors have shapes but no values."""
        return self.device.type == "meta"

    @property
    def embedding(self) -> nn.Embedding | None:
        """The token embedding of a text stack, else None; its output for ids enters the stack, and may be scaled."""
        names = [self.site.embed] if self.site.embed is not None else []
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Embedding) and any(f".{n}".endswith(f".{name}") for n in names):
                return module
        return None

    def part(self, role: str) -> Part:
        """Return what has `role` in this sub-layer as a function, quantised or not.

        `ffn.gate`, `ffn.up` and `ffn.down` are its frozen maps with their biases, `ffn.act` is the function after the
        gate, or after up if there is none. `ffn.router` gives logits, weights and experts, one row per token.

        Raises:
            MethodError: the site has none or several; a stack of experts does not count.
        """
        found = [s for s in self.site.parts if s.role == role]
        if len(found) != 1 or found[0].kind not in ("linear", "conv1d", "raw"):
            why = f"has no single {role} that runs on its own"
            raise self.refuse(why, "Name sub-layers that have one (sites=, layers=); stacked experts do not.")
        return Part(self._model.get_submodule(found[0].path), found[0])

    @property
    def index(self) -> int:
        """Rank of this site among its peers, from 0: stable across runs, for seeds."""
        return self.peers.index(self.site)

    def refuse(self, why: str, instead: str) -> MethodError:
        """Return the error to raise if a method does not fit this place; `why` follows the site's name."""
        return MethodError(f"{self.site.name} ({self.site.path}) {why}.", instead)

    def empty(self, *shape: int) -> nn.Parameter:
        """Return an uninitialised trainable tensor on the right device and dtype.

        Raises:
            MethodError: the site is a single parameter, whose widths are unknown.
        """
        if 0 in shape and self.site.in_features == 0:
            why = f"is of kind '{self.site.kind}' and has no width to adapt"
            raise self.refuse(why, "Name linear maps, or use a method that changes single parameters, like 'full'.")
        return nn.Parameter(torch.empty(*shape, device=self.device, dtype=self.dtype))

    def zeros(self, *shape: int) -> nn.Parameter:
        """Return a trainable tensor of zeros."""
        return nn.Parameter(self.empty(*shape).detach().zero_())

    def ones(self, *shape: int) -> nn.Parameter:
        """Return a trainable tensor of ones."""
        return nn.Parameter(self.empty(*shape).detach().fill_(1))

    def normal(self, *shape: int, std: float = 0.02, mean: float = 0.0) -> nn.Parameter:
        """Return a trainable tensor drawn from N(mean, std)."""
        return nn.Parameter(torch.nn.init.normal_(self.empty(*shape).detach(), mean, std))

    def kaiming(self, *shape: int) -> nn.Parameter:
        """Return a trainable tensor drawn as `nn.Linear` draws its weight: Kaiming uniform with a = sqrt(5)."""
        tensor = self.empty(*shape).detach()
        return nn.Parameter(torch.nn.init.uniform_(tensor, -(shape[-1] ** -0.5), shape[-1] ** -0.5))

    def bias(self, size: int, fan_in: int) -> nn.Parameter:
        """Return a trainable vector drawn as `nn.Linear` draws its bias: uniform within 1 / sqrt(fan_in)."""
        return nn.Parameter(torch.nn.init.uniform_(self.empty(size).detach(), -(fan_in**-0.5), fan_in**-0.5))

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Return `make()` of the first call with this key, which all deltas of the adapter share.

        Raises:
            MethodError: another site made it, with fields that differ from those here.
        """
        if key not in self._memo:
            self._memo[key] = (make(), self._owner)
        value, owner = self._memo[key]
        if owner is not self._owner:
            raise self.refuse("shares a tensor with sites whose fields differ", "Give its fields one value everywhere.")
        found: T = value
        return found

    def apart(self, key: str) -> Place:
        """Return this place for one of several adapters that are built together, each with its own `once`."""
        return Place(self.site, self._model, self.peers, self._memo.setdefault(f"apart {key}", {}), self._owner)
