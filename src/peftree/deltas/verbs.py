"""The five verbs: what a delta may do to a frozen model, each an abstract class that methods make concrete."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from peftree.sites import Site


class Frozen(NamedTuple):
    """The frozen parameters of a site as a delta sees them.

    Attributes:
        weight: `[out, in]` for every kind of linear map, `[experts, out, in]` for stacked experts, `[d]` for a norm.
        bias: `[out]` or None.
    """

    weight: Tensor
    bias: Tensor | None


class Host(nn.Module):
    """The child `deltas` of an adapted module, which the graft makes."""

    def alone(self, module: nn.Module, x: Tensor) -> Any:
        """Run the module without deltas."""
        raise NotImplementedError


class Part:
    """A frozen module of the base model as a function `x -> y`: its own forward, without deltas.

    No module, so that a delta that holds it neither saves nor counts what is the base's.

    Attributes:
        module: the module, which copies and moves with the model.
        site: where it is; of a fused map a part of its output.
    """

    def __init__(self, module: nn.Module, site: Site) -> None:
        self.module, self.site = module, site

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output for `x` `[..., in]`."""
        hub, rows, weight = self.module._modules.get("deltas"), self.site.rows, self.module._parameters.get("weight")
        if weight is not None and weight.is_floating_point():
            x = x.to(weight.dtype)  # T5 keeps its last map in float32
        y: Tensor = hub.alone(self.module, x) if isinstance(hub, Host) else self.module(x)
        return y if rows is None else y[..., rows[0] : rows[1]]


class Delta(nn.Module, ABC):
    """One adapter's tensors at one site. Concrete classes are final.

    Attributes:
        part: the number of the method's part that made it; None for what no part made (a task head).
        looks: True: it reads `scene()`, which tells padding from text where more than one token counts.
        blocks: how many blocks of attention it has of its own, which share the masks and the cache of the base model.
        first_block: the number of the first of them among those of the stack; the graft sets it.
        elastic: names of its tensors whose sizes training decides: a file says what they are.
    """

    part: int | None = None
    looks: bool = False
    blocks: int = 0
    first_block: int = 0
    elastic: ClassVar[tuple[str, ...]] = ()

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give `elastic` tensors these shapes, values to follow; a delta that keeps sizes elsewhere sets them too."""
        for name, shape in shapes.items():
            old = getattr(self, name)
            new = old.new_zeros(shape)
            setattr(self, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out tensors of one forward (a router's load, say), so that copies hold no graph."""
        return {k: None if isinstance(v, Tensor) and v.grad_fn is not None else v for k, v in self.__dict__.items()}

    def forward(self) -> Tensor:
        """Deltas are not called; the graft calls their verb."""
        raise TypeError(f"{type(self).__name__} is applied by its verb, not by calling it")


class Reweight(Delta):
    """`W -> W'` (and `b -> b'`): everything that can be folded into the weights.

    `weight` and `bias` are the definition. If `quick` is True the delta also gives an equal form that never builds
    `W'`: `y' = fast(input(x), base(input(x)), frozen)`. `reads_weight` says that `fast` needs the inner weight.
    """

    quick: bool = False
    reads_weight: ClassVar[bool] = False

    def weight(self, W: Tensor) -> Tensor:
        """Return the changed weight; `W` has the shape that `Frozen.weight` states."""
        return W

    def bias(self, b: Tensor | None) -> Tensor | None:
        """Return the changed bias (a module without one passes None and may get one)."""
        return b

    def changed(self, frozen: Frozen) -> Frozen:
        """Return the changed weight and bias; a delta whose bias depends on the weight overrides this."""
        return Frozen(self.weight(frozen.weight), self.bias(frozen.bias))

    def input(self, x: Tensor) -> Tensor:
        """Quick form, first half: the input the frozen module shall see."""
        return x

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        """Quick form, second half: the output from the input `x` `[..., in]` and the inner output `y` `[..., out]`.

        `y` is fresh and may be changed in place.
        """
        return y


class Rewrite(Delta):
    """`y -> y'`: changes a module's output (or input) and can not be folded into weights.

    `reads` says what `x` is at a branch site: the sub-layer's `input` or the `residual` stream before its norm. `maps`
    True: it takes the maps of a convolution, channels first.
    """

    reads: str = "input"
    maps: bool = False

    def input(self, x: Tensor) -> Tensor:
        """Return the input the frozen module shall see."""
        return x

    @abstractmethod
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the new output from the input `x` `[batch, ..., in]` and the output `y` `[batch, ..., out]`."""


class Attend(Delta):
    """K and V memory for one attention call.

    `shared` True: the memory joins the softmax, `Attn(Q, [K_m; K], [V_m; V])`. False: a softmax of its own whose
    result is added with `gate()`. `shift` True moves the positions of the real tokens by the memory's length, as a
    cache of past tokens does. `projects` True: the memory is made by the module's own projections.
    """

    shared: ClassVar[bool] = True
    shift: bool = False
    projects: bool = False

    @abstractmethod
    def memory(self, x: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return K and V, each `[length, kv_heads, head_dim]` or with a leading batch dimension.

        Args:
            x: hidden states entering the attention module, `[batch, tokens, d]`.
            project: maps hidden vectors `[length, d]` to K and V by the module's own projections.
        """

    def gate(self) -> Tensor | None:
        """Return the factor of the separate softmax (`shared` False), else None."""
        return None

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of memory slots."""


class Prepend(Delta):
    """Virtual tokens at the entry of a stack (depth 0) and, where `depths` says so, again at deeper layers."""

    depths: Sequence[int] = (0,)

    @abstractmethod
    def tokens(self, depth: int, x: Tensor) -> Tensor:
        """Return the tokens that enter layer `depth`, `[length, d]` or of each row `[batch, length, d]`.

        Args:
            depth: of the layer.
            x: at depth 0 the embedded input `[batch, tokens, d]`, else what the tokens of the layer before became,
                `[batch, length, d]`.
        """

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of virtual tokens."""


class Side(Delta):
    """A network beside a stack, fed by frozen hidden states; the stack runs without a graph."""

    @abstractmethod
    def side(self, taps: Sequence[Tensor], attend: SideAttention) -> Tensor:
        """Return what is added to the stack's last hidden state, `[batch, tokens, d]`.

        Args:
            taps: the stack's input to its first layer, then every layer's output; each `[batch, tokens, d]`.
            attend: attention that knows the stack's masks and cache.
        """


class SideAttention(ABC):
    """Attention of an adapter's own by the stack's masks and cache; q, k, v `[batch, heads, tokens, head_dim]`.

    Attributes:
        encoded: in a decoder that looks at an encoder, the encoder's output `[batch, tokens, d]`, else None.
    """

    encoded: Tensor | None

    @abstractmethod
    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return self-attention of block number `block`, whose keys and values join the cache."""

    @abstractmethod
    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return attention to keys and values made from `encoded`."""

    @abstractmethod
    def seen(self, block: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return all tokens so far of block number `block`, those of `x` `[batch, tokens, w]` last, and a mask.

        The new ones join the cache. The mask `[batch or 1, tokens or 1, all]` is True where one of `x` may look.
        """

    @abstractmethod
    def once(self, block: int, value: Tensor) -> Tensor:
        """Return `value` `[batch, d]`, or in a pass that continues a cache what it was in the first one."""


def finite(tensors: Sequence[Tensor]) -> bool:
    """Return True if no tensor holds a NaN or an infinity."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
