"""Cross-entropy of a linear head, some tokens at a time: no tensor of `[tokens, vocabulary]` is ever there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from peftree.errors import AdapterError

# Bytes of one chunk of float32 logits by device, and the fewest tokens of a chunk (measured on a CPU: decision 0040).
_CHUNK = {"cpu": 24 << 20, "other": 128 << 20}
_FEWEST = 128
OFF = "Set chunked_loss=false."


class Step(NamedTuple):
    """What a model does to its logits after the product: `mul` or `div` by a number, `tanh`, `add` a tensor, `to`.

    Attributes:
        name: which of the five.
        value: the number, the tensor `[vocabulary]` or the dtype; None for `tanh`.
    """

    name: str
    value: Any = None

    def __call__(self, z: Tensor) -> Tensor:
        """Apply it; the result may be `z`, changed in place."""
        if self.name == "to":
            return z.to(self.value)
        return z.tanh_() if self.name == "tanh" else getattr(z, f"{self.name}_")(self.value)

    def back(self, gradient: Tensor, z: Tensor | None) -> Tensor:
        """Turn the gradient of what it gave into that of what it got; `z`: what it gave, if it is `tanh`."""
        if self.name == "tanh":
            assert z is not None
            return gradient.mul_(z.square_().neg_().add_(1))
        if self.name == "add":
            return gradient
        return self(gradient)


@dataclass(frozen=True)
class Head:
    """A frozen linear map from hidden states to logits, and what the model does to the logits.

    Attributes:
        weight: `[vocabulary, width]`.
        bias: `[vocabulary]`, or None.
        dtype: of the product; that of autocast, if it is on.
        steps: in their order.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()

    @property
    def out(self) -> torch.dtype:
        """The dtype of the logits."""
        return next((s.value for s in reversed(self.steps) if s.name == "to"), self.dtype)

    def cast(self) -> Head:
        """Return the head with its weights in the dtype of its product."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return Head(self.weight.to(self.dtype), bias, self.dtype, self.steps)


def token_losses(
    hidden: Tensor, head: Head, places: Tensor, targets: Tensor, smoothing: float = 0.0, traced: bool = False
) -> Tensor:  # fmt: skip
    """Return the cross-entropy of chosen tokens, `[tokens]`, float32; its gradient reaches `hidden` only.

    The gradient with regard to the hidden states is computed with the losses and kept, `[tokens, width]`, so that
    each chunk of logits is computed once.

    Args:
        hidden: `[all, width]`.
        head: its weights get no gradient.
        places: rows of `hidden`, each at most once, int64 `[tokens]`.
        targets: int64 `[tokens]`.
        smoothing: share of the target that is spread over the vocabulary, as in `torch.nn.functional.cross_entropy`.
        traced: the tensors have no values, so that of all chunks, which hold the same, two will do; see `spans`.

    Raises:
        AdapterError: in the backward pass, if it is to be differentiated again.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    found: Tensor = _Losses.apply(hidden, head, places, targets, smoothing, wanted, traced)  # type: ignore[no-untyped-call]
    return found


def rows(vocabulary: int, device: torch.device) -> int:
    """Return how many tokens a chunk has."""
    return max(_FEWEST, _CHUNK.get(device.type, _CHUNK["other"]) // (4 * vocabulary))


def spans(count: int, size: int, traced: bool = False) -> list[slice]:
    """Return the chunks of `count` tokens; for a trace the first, and again the first where there are several.

    A trace then has the same events at all sizes with several chunks, so that plans can derive one from others.
    """
    found = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return [found[0]] * min(len(found), 2) if traced and found else found


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, places: Tensor, targets: Tensor, smoothing: float, wanted: bool,
        traced: bool,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(hidden.device.type, enabled=False):
            head, count = head.cast(), len(places)
            losses = hidden.new_empty(count, dtype=torch.float32)
            gradient = hidden.new_empty(count if wanted else 0, hidden.shape[1], dtype=head.dtype)
            size = rows(len(head.weight), hidden.device)
            for part in spans(count, size, traced):
                into = gradient[part] if wanted else None
                losses[part] = _chunk(hidden[places[part]].to(head.dtype), head, targets[part], smoothing, into)
        ctx.save_for_backward(gradient, places)
        ctx.like = hidden.shape, hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True: the gradient that was kept has no graph
            raise AdapterError("A loss without logits has no second derivative.", OFF)
        gradient, places = ctx.saved_tensors
        shape, dtype = ctx.like
        out = gradient.new_zeros(shape, dtype=dtype)
        out.index_copy_(0, places, (gradient * upstream[:, None]).to(dtype))
        return out, None, None, None, None, None, None


def _chunk(hidden: Tensor, head: Head, targets: Tensor, smoothing: float, into: Tensor | None) -> Tensor:
    """Return the losses of some tokens; write the gradients with regard to their hidden states `into` a tensor."""
    z = functional.linear(hidden, head.weight, head.bias)
    capped: list[Tensor] = []
    for step in head.steps:
        z = step(z)
        if step.name == "tanh" and into is not None:
            capped.append(z)
            z = z.clone()
    z = z.float()
    targets = targets[:, None]
    loss = z.gather(1, targets).neg_()
    even = z.mean(1, keepdim=True) if smoothing else None
    top = z.amax(1, keepdim=True)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    level = total.log().add_(top)  # log of the sum of the exponentials
    loss += level
    if even is not None:
        loss = loss * (1 - smoothing) + (level - even) * smoothing
    if into is not None:
        z.div_(total)
        z.scatter_add_(1, targets, loss.new_full(targets.shape, smoothing - 1))
        if smoothing:
            z.sub_(smoothing / z.shape[1])
        torch.mm(_back(z, head, capped), head.weight, out=into)
    return loss[:, 0]


def _back(gradient: Tensor, head: Head, capped: list[Tensor]) -> Tensor:
    """Return the gradient of the product, given that of the logits in float32 and what each `tanh` gave."""
    dtypes = [head.dtype]
    for step in head.steps:
        dtypes.append(step.value if step.name == "to" else dtypes[-1])
    gradient = gradient.to(dtypes[-1])
    for step, dtype in zip(reversed(head.steps), dtypes[-2::-1], strict=True):
        given = capped.pop() if step.name == "tanh" else None
        gradient = gradient.to(dtype) if step.name == "to" else step.back(gradient, given)
    return gradient
