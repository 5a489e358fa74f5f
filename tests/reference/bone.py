"""Bone (Bat): W'_ij = W_ij + W_ij D_i + D_i for every block r x r of W."""

import torch


def weight(W, p, f):
    rows = []
    for D, row in zip(p.D, W.split(f.r, 0), strict=True):
        rows.append(torch.cat([block + block @ D + D for block in row.split(f.r, 1)], 1))
    return torch.cat(rows)
