"""KronA: W' = W + P (x) Q."""

import torch


def weight(W, p, f):
    return W + torch.kron(p.w1, p.w2)
