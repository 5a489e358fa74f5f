"""PiSSA: W' = W - U_r S_r V_r^T + s B A, the principal part of W replaced by trained factors."""

import torch


def weight(W, p, f):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return W - (U[:, : f.r] * S[: f.r]) @ Vh[: f.r] + f.alpha / f.r * p.B.T @ p.A
