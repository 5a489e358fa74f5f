"""FourierFT: W' = W + alpha Re IFFT2(F), F zero but for c at places drawn with the seed."""

import torch


def weight(W, p, f):
    places = torch.randperm(p.n * p.m, generator=torch.Generator().manual_seed(f.basis_seed))[: f.n]
    F = torch.zeros(p.m, p.n).index_put((places // p.n, places % p.n), p.c)
    return W + f.alpha * torch.fft.ifft2(F).real
