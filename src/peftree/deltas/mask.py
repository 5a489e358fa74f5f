"""Binary masks over trained scores: straight-through gradients, packed bits, and a bottleneck shared under masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.branch import Activation, Bottleneck
from peftree.deltas.place import Place


def top_mask(scores: Tensor, keep: float) -> Tensor:
    """Return 1 at the share `keep` of entries with the largest |score|, else 0; the gradient goes straight to |score|.

    Args:
        scores: any shape; the result has the same.
        keep: in (0, 1]; `int((1 - keep) n)` of the n entries are dropped.
    """
    size = scores.abs()
    count = scores.numel() - int((1 - keep) * scores.numel())
    kept = size.detach().flatten().topk(count).indices
    mask = torch.zeros_like(size.detach()).flatten().scatter(0, kept, 1.0).view_as(size)
    return mask + (size - size.detach())


def pack_bits(mask: Tensor) -> Tensor:
    """Return a mask of zeros and ones as bytes `[ceil(n / 8)]`, the first entry in the lowest bit."""
    flat = mask.flatten().to(torch.uint8)
    rows = functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    powers = 2 ** torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (rows * powers).sum(1).to(torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits`: return a mask of bytes 0 and 1 of the given shape."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[:, None] >> places & 1).flatten()[: math.prod(shape)].view(*shape)


class MaskedBottleneck(Bottleneck):
    """A bottleneck whose D and U are shared by all places of one width, each under the place's own binary mask.

    Args:
        place: where it goes; the first place of a width makes the prototype.
        size: bottleneck width b.
        activation: phi.
        keep: share of the entries of D and of U that this place keeps.
        std: D and U start N(0, std).
    """

    def __init__(self, place: Place, size: int, activation: Activation, keep: float, std: float = 0.02) -> None:
        super().__init__(place, size, activation, std=std)
        prototype = place.once(f"prototype {tuple(self.up.shape)}", lambda: self)
        for name in ("down", "down_bias", "up", "up_bias"):
            setattr(self, name, prototype._parameters[name])
        out = place.site.out_features
        self.keep = keep
        self.down_score: nn.Parameter | None = place.kaiming(out, size)
        self.up_score: nn.Parameter | None = place.kaiming(size, out)

    down_bits: Tensor
    up_bits: Tensor

    def scores(self) -> list[nn.Parameter]:
        """Return the scores of D and U; none after `fold`."""
        return [s for s in (self.down_score, self.up_score) if s is not None]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return D, b, U and c with the masks applied."""
        if self.down_score is None or self.up_score is None:
            down, up = unpack_bits(self.down_bits, self.up.shape), unpack_bits(self.up_bits, self.down.shape)
        else:
            down, up = top_mask(self.down_score, self.keep), top_mask(self.up_score, self.keep)
        return self.down * down.t(), self.down_bias, self.up * up.t(), self.up_bias

    def fold(self) -> None:
        """Keep the masks as bits and forget the scores."""
        if self.down_score is not None and self.up_score is not None:
            self.register_buffer("down_bits", pack_bits(top_mask(self.down_score, self.keep)))
            self.register_buffer("up_bits", pack_bits(top_mask(self.up_score, self.keep)))
            self.down_score = self.up_score = None
