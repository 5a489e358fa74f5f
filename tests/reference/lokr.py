"""LoKr: W' = W + (alpha / r) w1 (x) w2, either factor whole or a product of two thin ones."""

import torch


def factor(p, n):
    return vars(p)[n] if n in vars(p) else vars(p)[f"{n}_a"] @ vars(p)[f"{n}_b"]


def weight(W, p, f):
    return W + f.alpha / f.r * torch.kron(factor(p, "w1"), factor(p, "w2"))
