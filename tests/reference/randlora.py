"""RandLoRA: W' = W + (alpha / r) sum_k B_k diag(L_k) A diag(G_k), transposed where W is wider than high."""

import torch


def weight(W, p, f):
    r, count = p.L.shape
    low, high = sorted(W.shape)
    A = p.bases_A[:, 0, :low]
    flat = p.bases_B[:high, :count].reshape(high, -1)
    bases = [torch.stack([flat[:, i * count + k] for i in range(r)], 1) for k in range(count)]
    term = sum(B @ p.L[:, k].diag() @ A @ p.G[k].diag() for k, B in enumerate(bases))
    return W + f.alpha / f.r * (term if p.n <= p.m else term.T)
