"""SURM: W' = W + alpha C, C_ij = (a * b)_((i - j) mod n), n the larger width of W."""

import torch


def weight(W, p, f):
    n = max(p.m, p.n)
    C = torch.stack([(p.a * p.b).roll(j) for j in range(n)], 1)
    return W + f.alpha * C[: p.m, : p.n]
