"""Combinators around deltas: a learned gate, and a weighted sum of effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from peftree.deltas.branch import Bottleneck
from peftree.deltas.place import Place
from peftree.deltas.scene import scene
from peftree.deltas.text import by_rows
from peftree.deltas.verbs import Attend, Delta, Frozen, Reweight, Rewrite
from peftree.errors import MethodError


class _Gate(nn.Module):
    """`g(x) = mean over real tokens of sigmoid(w x + b)`, one number per row of the batch (UniPELT, section 3.2)."""

    def __init__(self, place: Place, width: int) -> None:
        super().__init__()
        self.w = place.normal(width, std=0.02)
        self.b = place.zeros(1)
        self.name = place.site.name
        self.encoded = place.site.role in ("xattn.k", "xattn.v")

    def forward(self, x: Tensor) -> Tensor:
        """Return the gate, one number per entry of the first dimension of `x` `[batch, tokens, width]`.

        Inside experts, `x` is `[batch * tokens, width]`, and each token has the gate of its row.

        Raises:
            MethodError: `x` holds some of the tokens, and their rows are unknown.
        """
        score: Tensor = torch.sigmoid(by_rows(x, self.name).to(self.w.dtype) @ self.w + self.b)
        real = scene().encoded if self.encoded else scene().real
        if real is not None and real.shape == score.shape:
            gate = (score * real).sum(1) / real.sum(1).clamp(min=1)
        else:
            gate = score.mean(1)
        return (gate.repeat_interleave(score.shape[1]) if x.dim() == 2 else gate).to(x.dtype)


class GatedOutput(Rewrite):
    """`y + g (d(x, y) - y)`: the inner delta's effect times a gate computed from the input of that delta.

    That is `y` for a bottleneck after a sub-layer, else `x`.
    """

    looks = True

    def __init__(self, place: Place, inner: Rewrite | Reweight) -> None:
        super().__init__()
        self.inner = inner
        self.after = isinstance(inner, Bottleneck) and not inner.parallel
        self.gate = _Gate(place, place.site.out_features if self.after else place.site.in_features)
        if isinstance(inner, Rewrite):
            self.reads = inner.reads

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the gated output."""
        if isinstance(self.inner, Rewrite):
            new = self.inner.output(x, y)
        else:
            new = self.inner.fast(x, y.clone(), Frozen(y, None))
        g: Tensor = self.gate(y if self.after else x).view(-1, *[1] * (y.dim() - 1))
        return y + g * (new - y)


class GatedMemory(Attend):
    """The inner memory times a gate computed from the attention module's input."""

    looks = True

    def __init__(self, place: Place, inner: Attend) -> None:
        super().__init__()
        self.inner = inner
        self.gate_net = _Gate(place, place.site.in_features)
        self.shift, self.projects = inner.shift, inner.projects

    def memory(self, x: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return K and V `[batch, length, kv_heads, head_dim]`."""
        g = self.gate_net(x).view(-1, 1, 1, 1)
        K, V = (m if m.dim() == 4 else m.unsqueeze(0) for m in self.inner.memory(x, project))
        return g * K, g * V

    @property
    def length(self) -> int:
        """Number of memory slots."""
        return self.inner.length


def gated(place: Place, inner: Delta) -> Delta:
    """Wrap `inner` in a gate that reads the inner delta's input."""
    if isinstance(inner, Attend) and inner.shared:
        return GatedMemory(place, inner)
    quick = isinstance(inner, Reweight) and inner.quick and not inner.reads_weight
    if isinstance(inner, Rewrite) or quick:
        return GatedOutput(place, inner)  # type: ignore[arg-type]
    raise MethodError(
        f"{type(inner).__name__} at {place.site.name} cannot be gated.",
        "Gate outputs, low-rank terms or shared-softmax memories.",
    )


class FusedWeight(Reweight):
    """`W + sum_i w_i (d_i(W) - W)`: the weighted sum of what each delta does to the weight."""

    def __init__(self, inner: Sequence[Reweight], weights: Sequence[float]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)
        self.weights = list(weights)
        self.quick = all(d.quick and type(d).input is Reweight.input for d in inner)

    def weight(self, W: Tensor) -> Tensor:
        """Return the changed weight."""
        return self._mixed(W, [d.weight(W) for _, d in self._pairs()])

    def _mixed(self, W: Tensor, new: Sequence[Tensor]) -> Tensor:
        return W + sum(w * (n - W) for w, n in zip(self.weights, new, strict=True))

    def changed(self, frozen: Frozen) -> Frozen:
        """Return the changed weight and bias."""
        b, made = frozen.bias, [(w, d.changed(frozen)) for w, d in self._pairs()]
        new_W, new = self._mixed(frozen.weight, [n.weight for _, n in made]), [(w, n.bias) for w, n in made]
        if all(n is b for _, n in new):
            return Frozen(new_W, b)
        zero = next(torch.zeros_like(n) for _, n in new if n is not None) if b is None else b
        return Frozen(new_W, zero + sum(w * (n - zero) for w, n in new if n is not None))

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        """Return the changed output."""
        return y + sum(w * (d.fast(x, y.clone(), frozen) - y) for w, d in self._pairs())

    def _pairs(self) -> list[tuple[float, Reweight]]:
        return list(zip(self.weights, self.inner, strict=True))  # type: ignore[arg-type]

    reads_weight = True


class FusedOutput(Rewrite):
    """`y + sum_i w_i (d_i(x, y) - y)`: the weighted sum of what each delta does to the output."""

    def __init__(self, inner: Sequence[Rewrite], weights: Sequence[float]) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)
        self.weights = list(weights)
        self.reads = inner[0].reads
        self.looks, self.maps = any(d.looks for d in inner), inner[0].maps

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the changed output."""
        pairs = zip(self.weights, self.inner, strict=True)
        change: Tensor = sum(w * (d.output(x, y) - y) for w, d in pairs)  # type: ignore[operator,assignment]
        return y + change
