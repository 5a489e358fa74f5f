"""The five verbs: what a delta may do to a frozen model, each an abstract class that methods make concrete."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Frozen(NamedTuple):
    """The frozen parameters of a site as a delta sees them.

    Attributes:
        weight: `[out, in]` for every kind of linear map, `[experts, out, in]` for stacked experts, `[d]` for a norm.
        bias: `[out]` or None.
    """

    weight: Tensor
    bias: Tensor | None


class Delta(nn.Module, ABC):
    """One adapter's tensors at one site. Concrete classes are final."""

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

    `reads` says what `x` is at a branch site: the sub-layer's `input` or the `residual` stream before its norm.
    """

    reads: str = "input"

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
    cache of past tokens does.
    """

    shared: ClassVar[bool] = True
    shift: bool = False

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
    def tokens(self, depth: int) -> Tensor:
        """Return the tokens that enter layer `depth`, `[length, d]`."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of virtual tokens."""


class Side(Delta):
    """A network beside a stack, fed by frozen hidden states; the stack runs without a graph.

    `blocks` counts its attention blocks, which share the cache of the base model.
    """

    blocks: int = 0

    @abstractmethod
    def side(self, taps: Sequence[Tensor], attend: SideAttention) -> Tensor:
        """Return what is added to the stack's last hidden state, `[batch, tokens, d]`.

        Args:
            taps: the stack's input to its first layer, then every layer's output; each `[batch, tokens, d]`.
            attend: attention that knows the stack's masks and cache.
        """


class SideAttention(ABC):
    """Attention for a side network by the stack's own masks and cache; q, k, v `[batch, heads, tokens, head_dim]`.

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


def finite(tensors: Sequence[Tensor]) -> bool:
    """Return True if no tensor holds a NaN or an infinity."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
