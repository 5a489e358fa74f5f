"""OFT: W' = W blockdiag(R_i)^T, R = (I - Q)(I + Q)^-1, Q skew-symmetric with b (b - 1) / 2 free entries."""

import torch


def weight(W, p, f):
    b = min(f.block, p.n)
    one = torch.eye(b)
    row, column = torch.triu_indices(b, b, 1)
    blocks = []
    for q in p.q:
        Q = torch.zeros(b, b).index_put((row, column), q)
        Q = Q - Q.T
        blocks.append((one - Q) @ torch.linalg.inv(one + Q))
    return W @ torch.block_diag(*blocks).T
