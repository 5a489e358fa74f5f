"""LoRA-X: W' = W + U_r diag(d) V_r^T, the leading singular vectors of W around a diagonal."""

import torch


def weight(W, p, f):
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return W + U[:, : f.r] @ p.core.diag() @ Vh[: f.r]
