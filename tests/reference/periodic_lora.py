"""PeriodicLoRA: W' = W + (alpha / r) (B A + sum of the past periods' B_i A_i)."""


def weight(W, p, f):
    return W + f.alpha / f.r * (p.B.T @ p.A + p.B0.T @ p.A0)
