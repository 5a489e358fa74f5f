"""CapaBoost: W' = W + (alpha / r) sum_i (B * m_i) (A * n_i), the masks as drawn."""


def weight(W, p, f):
    for n, m in zip(p.mask_A, p.mask_B, strict=True):
        W = W + f.alpha / f.r * (p.B * m).T @ (p.A * n)
    return W
