"""OLoRA: W' = W - Q_r R_r + s B A, the first r columns of Q and rows of R in W = Q R replaced by trained factors."""

import torch


def weight(W, p, f):
    Q, R = torch.linalg.qr(W)
    s = f.alpha / f.r
    return W - s * Q[:, : f.r] @ R[: f.r] + s * p.B.T @ p.A
