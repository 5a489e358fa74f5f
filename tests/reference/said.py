"""SAID: W' = W + c P t, P = H G Pi H S by dense Hadamard matrices, scaled to keep the norm on average."""

import torch


def weight(W, p, f):
    H, N, n = torch.ones(1, 1), len(p.fastfood_signs), W.numel()
    while len(H) < N:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    padded = torch.cat([p.t, torch.zeros(N - len(p.t))])
    G = p.fastfood_normal / p.fastfood_normal.norm()
    x = H @ (G * (H @ (p.fastfood_signs * padded))[p.fastfood_order.long()])
    return W + p.c * (x[:n] / n**0.5).view_as(W)
