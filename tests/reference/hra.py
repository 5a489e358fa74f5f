"""HRA: W' = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T), u_i the unit vectors of the columns of U."""

import torch


def weight(W, p, f):
    for u in (p.U / p.U.norm(dim=0)).T:
        W = W @ (torch.eye(p.n) - 2 * torch.outer(u, u))
    return W
