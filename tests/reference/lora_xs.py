"""LoRA-XS: W' = W + (alpha / r) U_r S_r R V_r^T, the leading singular triplets of W around R."""

import torch


def weight(W, p, f):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return W + f.alpha / f.r * U[:, : f.r] @ S[: f.r].diag() @ p.core @ Vh[: f.r]
