"""Banks of frozen random bottlenecks under trained masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.mask import pack_bits, unpack_bits
from peftree.deltas.matrix import drawn_on
from peftree.deltas.place import Place
from peftree.deltas.verbs import Rewrite


class MaskedBank(Rewrite):
    """`y + U relu(n(D y))`, D `[b, d]` and U `[d, b]` sums over n frozen ones under two masks; n(..) a layer norm.

    Args:
        place: where it goes.
        count: the number of frozen ones, drawn from N(0, 0.02).
        size: bottleneck width b.
        k: a mask is 1 at the k largest of its logits, and gradients go to their softmax; 0: it is the softmax.
        seed: the seed that they are drawn from, with the number of the place.
    """

    D: Tensor
    U: Tensor

    def __init__(self, place: Place, count: int, size: int, k: int, seed: int) -> None:
        super().__init__()
        d, self.k = place.site.out_features, min(k, count)
        generator = torch.Generator().manual_seed(seed + place.index)
        for name, shape in (("D", (count, size, d)), ("U", (count, d, size))):
            drawn = torch.empty(shape, device=drawn_on(place)).normal_(0.0, 0.02, generator=generator)
            self.register_buffer(name, drawn.to(place.device, place.dtype), persistent=False)
        self.logits: nn.Parameter | None = place.normal(2, count)
        self.gain, self.shift = place.ones(size), place.zeros(size)

    def masks(self) -> Tensor:
        """Return the masks of D and of U, `[2, n]`."""
        if self.logits is None:
            return unpack_bits(self.get_buffer("bits"), (2, len(self.D))).to(self.D.dtype)
        soft = self.logits.softmax(-1)
        if not self.k:
            return soft
        hard = torch.zeros_like(soft).scatter(-1, self.logits.detach().topk(self.k).indices, 1.0)
        return hard + (soft - soft.detach())

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output plus the branch."""
        down, up = self.masks()
        made = (torch.tensordot(down, self.D, 1), torch.tensordot(up, self.U, 1), self.gain, self.shift)
        D, U, gain, shift = (t.to(y.dtype) for t in made)
        inner = functional.layer_norm(functional.linear(y, D), gain.shape, gain, shift)
        return y + functional.linear(functional.relu(inner), U)

    def fold(self) -> None:
        """Keep masks of zeros and ones as bits, and forget the logits."""
        if self.logits is not None and self.k:
            self.register_buffer("bits", pack_bits(self.masks().detach().round()))
            self.logits = None
