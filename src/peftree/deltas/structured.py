"""Structured matrices: changes of a weight that are made from few numbers and applied without being built."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftree.deltas.matrix import LINEAR
from peftree.deltas.place import Place
from peftree.deltas.verbs import Frozen, Reweight


class Added(Reweight):
    """`W' = W + scale * M`. A subclass says what M is (`change`) and, unless `quick` is False, `times`.

    Args:
        place: where it goes.
        scale: the fixed factor.
        dropout: probability of dropping entries of the input of M in training.
        quick: whether M x can be computed without building M.
    """

    def __init__(self, place: Place, scale: float = 1.0, dropout: float = 0.0, quick: bool = True) -> None:
        super().__init__()
        self.scale, self.dropout, self.quick = scale, dropout, quick and place.site.kind in LINEAR

    def change(self) -> Tensor:
        """Return M, `[..., out, in]`."""
        raise TypeError(f"{type(self).__name__} must override change()")

    def times(self, x: Tensor) -> Tensor:
        """Return M x `[..., out]` for `x` `[..., in]`."""
        return functional.linear(x, self.change().to(x.dtype))

    def weight(self, W: Tensor) -> Tensor:
        """`W + scale * M`."""
        return (W + self.scale * self.change()).to(W.dtype)

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        """`y + scale * M x`."""
        more = self.times(functional.dropout(x, self.dropout, self.training))
        return y.add_(more.to(y.dtype), alpha=self.scale)


def factor_pair(total: int, factor: int = 0) -> tuple[int, int]:
    """Return two numbers whose product is `total`: `factor` and the rest if it divides, else the most even pair.

    Args:
        total: at least 1.
        factor: the first number; if it does not divide, a bound on the smaller one. 0: no bound.

    >>> factor_pair(128), factor_pair(128, 4), factor_pair(127), factor_pair(12, 5)
    ((8, 16), (4, 32), (1, 127), (3, 4))
    """
    if factor and total % factor == 0:
        return factor, total // factor
    low = next(d for d in range(min(isqrt(total), factor or total), 0, -1) if total % d == 0)
    return low, total // low


def circulant(v: Tensor, out: int, width: int) -> Tensor:
    """Return the matrices with entries `v[(i - j) mod L]`, `[..., out, width]`, from `v` `[..., L]`.

    With L = out = width they are circulant, with L >= out + width - 1 any Toeplitz matrix is one.
    """
    i, j = torch.arange(out, device=v.device), torch.arange(width, device=v.device)
    return v[..., (i[:, None] - j) % v.shape[-1]]


def convolved(x: Tensor, v: Tensor, out: int) -> Tensor:
    """Return `sum_n circulant(v[m, n]) x[n]`, `[..., M, out]`, by the Fourier transform in at least float32.

    Args:
        x: `[..., N, width]`, width at most L.
        v: `[M, N, L]`.
        out: at most L.
    """
    size = v.shape[-1]
    full = v.dtype if v.dtype == torch.float64 else torch.float32
    spectrum = torch.einsum("...nk,mnk->...mk", torch.fft.rfft(x.to(full), n=size), torch.fft.rfft(v.to(full), n=size))
    y: Tensor = torch.fft.irfft(spectrum, n=size)[..., :out]
    return y.to(x.dtype)


class Term(nn.Module):
    """A matrix of a chosen form that broadcasts to `shape`; zero at the start.

    `lora`: `Xd Xu`, Xd `[rows, r]` zero, Xu `[r, columns]` Kaiming uniform. `vector`: X, a number per row. `constant`:
    X, one number. `none`: no tensor, 0.

    Args:
        place: where it goes.
        form: one of these.
        r: rank of `lora`.
        shape: rows and columns, or the length of a vector.
    """

    def __init__(self, place: Place, form: str, r: int, *shape: int) -> None:
        super().__init__()
        self.form, self.shape = form, shape
        if form == "lora":
            self.Xd, self.Xu = place.zeros(shape[0], r), place.kaiming(r, shape[1])
        elif form != "none":
            self.X = place.zeros(shape[0], *[1] * (len(shape) - 1)) if form == "vector" else place.zeros(1)

    @property
    def zeros(self) -> Tensor | None:
        """What PEFT stores if there is no term: zeros of the whole shape."""
        return torch.zeros(self.shape) if self.form == "none" else None

    def forward(self) -> Tensor | float:
        """Return the term."""
        return self.Xd @ self.Xu if self.form == "lora" else 0.0 if self.form == "none" else self.X
