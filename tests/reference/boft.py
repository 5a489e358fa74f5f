"""BOFT: W' = diag(s) W R^T, R = R_m ... R_1, R_i = P_i blockdiag(cayley) P_i^T."""

import torch


def order(n, b, i):
    """The inputs of each group of b 2^i: halves of blocks 0, 2, 4 ..., then 1, 3, 5 ..."""
    halves = torch.arange(n).reshape(-1, 2 << i, b // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], 1).reshape(-1) if i else torch.arange(n)


def weight(W, p, f):
    one, R = torch.eye(f.block), torch.eye(p.n)
    for i, blocks in enumerate(p.q):
        P = torch.eye(p.n)[order(p.n, f.block, i)]
        Q = [(q - q.T) / 2 for q in blocks]
        R = P @ torch.block_diag(*[(one - q) @ torch.linalg.inv(one + q) for q in Q]) @ P.T @ R
    return p.s * W @ R.T
