"""RoCoFT, rows: W' = W + S_I R, the first k rows are trained."""

import torch


def weight(W, p, f):
    return torch.cat([W[: f.k] + p.values, W[f.k :]])
