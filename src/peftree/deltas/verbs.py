"""The five verbs: what a delta may do to a frozen model, each an abstract class that methods implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftree.sites import Site


class Frozen:
    """The frozen parameters of a site as a delta sees them.

    Args:
        weight: `[out, in]` for every kind of linear map, `[experts, out, in]` for stacked experts, `[d]` for a norm; or
            a function that makes it, which is called at every reading (a quantised base).
        bias: `[out]` or None.
    """

    __slots__ = ("_weight", "bias")

    def __init__(self, weight: Tensor | Callable[[], Tensor], bias: Tensor | None) -> None:
        self._weight, self.bias = weight, bias

    @property
    def weight(self) -> Tensor:
        """The weight; a new tensor at every reading if the base is quantised."""
        return self._weight if isinstance(self._weight, Tensor) else self._weight()


class Host(nn.Module):
    """The child `deltas` of an adapted module, which the graft creates."""

    def alone(self, module: nn.Module, x: Tensor) -> Any:
        """Run the module without deltas."""
        raise NotImplementedError


class Part:
    """A frozen module of the base model as a function `x -> y`: its own forward, without deltas.

    It is not a module, so that a delta that holds it neither saves nor counts the base's parameters.

    Attributes:
        module: the module, which is copied and moved with the model.
        site: its site; for a fused map, a part of its output.
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
        part: the number of the method's part that made it; None if no part did (a task head).
        looks: whether it reads `scene()`, which separates padding from text if more than one token counts.
        blocks: number of its own attention blocks, which share the masks and the cache of the base model.
        first_block: the number of the first of them in the stack; the graft sets it.
        elastic: names of its tensors whose sizes training decides; loading takes the sizes in the file.
    """

    part: int | None = None
    looks: bool = False
    blocks: int = 0
    first_block: int = 0
    elastic: ClassVar[tuple[str, ...]] = ()

    def resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Give `elastic` tensors these shapes; values follow. A delta that keeps sizes elsewhere sets those too."""
        for name, shape in shapes.items():
            old = getattr(self, name)
            new = old.new_zeros(shape)
            setattr(self, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out tensors of one forward pass (such as a router's load), so that copies hold no graph."""
        return {k: None if isinstance(v, Tensor) and v.grad_fn is not None else v for k, v in self.__dict__.items()}

    def forward(self) -> Tensor:
        """Deltas are not called; the graft calls their verb."""
        raise TypeError(f"{type(self).__name__} is applied by its verb, not by calling it")


class Reweight(Delta):
    """`W -> W'` (and `b -> b'`): everything that can be folded into the weights.

    `weight` and `bias` define it. If `quick` is True, the delta also gives an equal form that never builds
    `W'`: `y' = fast(input(x), base(input(x)), frozen)`. `reads_weight` says whether `fast` needs the inner weight.
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
        """Quick form, first half: return the input for the frozen module."""
        return x

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        """Quick form, second half: return the output from input `x` `[..., in]` and inner output `y` `[..., out]`.

        `y` is fresh and may be changed in place.
        """
        return y

    def fused(self, x: Tensor, frozen: Frozen) -> Tensor | None:
        """Fast form, if a delta has one: return the output of a whole linear map from its input, in one function.

        Equal to the quick form; None where that has to run.
        """
        return None


class Rewrite(Delta):
    """`y -> y'`: changes a module's output (or input) and cannot be folded into weights.

    `reads` says what `x` is at a branch site: the sub-layer's `input` or the `residual` stream before its norm. `maps`
    says whether it takes the maps of a convolution, channels first.
    """

    reads: str = "input"
    maps: bool = False

    def input(self, x: Tensor) -> Tensor:
        """Return the input for the frozen module."""
        return x

    @abstractmethod
    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the new output from the input `x` `[batch, ..., in]` and the output `y` `[batch, ..., out]`."""


class Attend(Delta):
    """K and V memory for one attention call.

    If `shared`, the memory joins the softmax, `Attn(Q, [K_m; K], [V_m; V])`; else it has a separate softmax, whose
    result is added with `gate()`. `shift` moves the positions of the real tokens by the memory's length, as a
    cache of past tokens does. `projects`: the module's own projections make the memory.
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
        """Return the factor of the separate softmax (if not `shared`), else None."""
        return None

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of memory slots."""


class Prepend(Delta):
    """Virtual tokens at the entry of a stack (depth 0) and, if `depths` says so, again at deeper layers."""

    depths: Sequence[int] = (0,)

    @abstractmethod
    def tokens(self, depth: int, x: Tensor) -> Tensor:
        """Return the tokens that enter layer `depth`, `[length, d]` or per row `[batch, length, d]`.

        Args:
            depth: the depth of the layer.
            x: at depth 0 the embedded input `[batch, tokens, d]`, else the previous layer's output for its tokens,
                `[batch, length, d]`.
        """

    @property
    @abstractmethod
    def length(self) -> int:
        """Number of virtual tokens."""


class Side(Delta):
    """A network next to a stack, fed by frozen hidden states; the stack runs without a graph."""

    @abstractmethod
    def side(self, taps: Sequence[Tensor], attend: SideAttention) -> Tensor:
        """Return the term to add to the stack's last hidden state, `[batch, tokens, d]`.

        Args:
            taps: the stack's input to its first layer, then every layer's output; each `[batch, tokens, d]`.
            attend: attention that knows the stack's masks and cache.
        """


class SideAttention(ABC):
    """An adapter's own attention with the stack's masks and cache; q, k, v `[batch, heads, tokens, head_dim]`.

    Attributes:
        encoded: in a decoder that attends to an encoder, the encoder's output `[batch, tokens, d]`, else None.
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
        """Return all tokens so far of block number `block`, with those of `x` `[batch, tokens, w]` last, and a mask.

        The new tokens join the cache. The mask `[batch or 1, tokens or 1, all]` is True where a token of `x` may look.
        """

    @abstractmethod
    def once(self, block: int, value: Tensor) -> Tensor:
        """Return `value` `[batch, d]`, or its value in the first pass if this one continues a cache."""


def finite(tensors: Sequence[Tensor]) -> bool:
    """Return True if no tensor holds a NaN or an infinity."""
    # A NaN or an infinity makes the sum one; the sum of finite values may overflow, so only then every value is read.
    return all(bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all()) for t in (t.detach() for t in tensors))
