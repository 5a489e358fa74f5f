"""Diff pruning without draws: W' = W + z_g z * w, z = min(1, max(0, 1.5 (2 sigmoid(a) - 1)))."""

import torch


def gate(a):
    return (1.5 * (2 / (1 + torch.exp(-a)) - 1)).clamp(min=0, max=1)


def weight(W, p, f):
    return W + gate(p.whole) * gate(p.a) * p.w
