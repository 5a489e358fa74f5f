"""Matrices from few numbers: the shape of a weight, seeded frozen bases, and orthogonal blocks by the Cayley map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftree.deltas.place import Place

LINEAR = ("linear", "conv1d")
MATRICES = (*LINEAR, "conv", "embedding", "expert")
TINY = 1e-18  # norms below it count as it, so that a row of zeros divides to zeros


def only(place: Place, kinds: tuple[str, ...]) -> None:
    """Raise MethodError unless the site is of one of `kinds`."""
    if place.site.kind not in kinds:
        why = f"is of kind '{place.site.kind}'; this method changes {', '.join(kinds)}"
        raise place.refuse(why, "Name other sites; `peftree inspect` lists them with their kinds.")


def matrix(place: Place, kinds: tuple[str, ...] = MATRICES) -> tuple[tuple[int, ...], int, int]:
    """Return `(lead, out, in)` of the weight at `place`; `lead` is `(experts,)` for stacked experts, else empty.

    Raises:
        MethodError: the site is not of one of `kinds`.
    """
    only(place, kinds)
    *lead, out, width = place.frozen.weight.shape
    return tuple(lead), out, width


def drawn_on(place: Place) -> str:
    """Return where frozen values are drawn: the CPU, for the same on every machine; `meta` if there are no values."""
    return "meta" if place.abstract else "cpu"


class Bases(nn.Module):
    """Frozen A `[r, in]` and B `[out, r]` of the largest widths among the peers of a place, shared and never stored.

    Drawn Kaiming uniform (ReLU gain, fan in = last size) in float32 on the CPU from one generator, A first: the same
    on every machine, and bit for bit the bases that Hugging Face PEFT draws for VeRA.
    """

    A: Tensor
    B: Tensor

    def __init__(self, place: Place, r: int, seed: int) -> None:
        super().__init__()
        only(place, MATRICES)
        width, out = (max(sizes) for sizes in zip(*((s.in_features, s.out_features) for s in place.peers), strict=True))
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (r, width)), ("B", (out, r))):
            bound = 3.0**0.5 * (2.0**0.5 / shape[1] ** 0.5)  # in this order, for the last bit
            basis = torch.empty(shape, device=drawn_on(place)).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, basis.to(place.device, place.dtype), persistent=False)


def seeded_indices(count: int, size: int, seed: int) -> Tensor:
    """Return `count` different indices below `size`, int64 on the CPU, the same on every machine."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


def nearest_divisor(total: int, wanted: int) -> int:
    """Return the divisor of `total` that is nearest to `wanted`, the smaller of two; at most `total`.

    >>> nearest_divisor(48, 32), nearest_divisor(48, 20), nearest_divisor(32, 64)
    (24, 16, 32)
    """
    return min((abs(d - wanted), d) for d in range(1, total + 1) if total % d == 0)[1]


def within(q: Tensor, eps: float) -> Tensor:
    """Return the entries of skew-symmetric matrices `[..., n, k]`, none with a Frobenius norm above eps / sqrt(n).

    Gradients are those at the returned value, passed on unchanged: a projection, not a change of variables.
    """
    norm = (2 * q.detach().square().sum(-1, keepdim=True)).sqrt()
    bound = eps / q.shape[-2] ** 0.5
    out: Tensor = q + (q.detach() * (bound / norm).clamp(max=1.0) - q.detach()).where(norm > bound, 0.0)
    return out


def cayley(q: Tensor, size: int, terms: int = 0) -> Tensor:
    """Return the orthogonal matrices `(I - Q)(I + Q)^-1`, `[..., size, size]`.

    With `terms` n > 0, it is the sum `I + 2 Q + ... + 2 Q^(n - 2) + Q^(n - 1)` (two terms: `I + 2 Q`), which
    approximates the inverse of that matrix.

    Args:
        q: entries above the diagonal of the skew-symmetric Q, row by row, `[..., size (size - 1) / 2]`; zeros
            give the identity.
        size: the width of a block.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=q.device)
    upper = q.new_zeros(*q.shape[:-1], size, size)
    upper[..., rows, columns] = q
    skew = upper - upper.mT
    eye = torch.eye(size, device=q.device, dtype=q.dtype)
    if terms:
        total, power = eye.expand_as(skew), skew
        for n in range(1, terms):
            total = total + (1.0 if n == terms - 1 > 1 else 2.0) * power
            power = power @ skew
        return total
    R: Tensor = torch.linalg.solve(eye + skew, eye - skew)  # the two commute: the side does not matter
    return R


@torch.no_grad()
def added_norm(square: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the norm of every row of `W + scale * Bᵀ A`, `[out]`, without building the sum and outside the graph.

    `||W + s BA||² = ||W||² + 2 s <B, W Aᵀ> + s² B (A Aᵀ) Bᵀ`, row by row.

    Args:
        square: squared norm of every row of W, `[out]`.
        W: `[out, in]`; A: `[r, in]`; B: `[r, out]`.
    """
    cross = (W @ A.to(W.dtype).t()).t().to(B.dtype)
    gram = scale * (A @ A.t()) @ B
    return (square + scale * (B * (2 * cross + gram)).sum(0)).clamp_min(TINY**2).sqrt()
