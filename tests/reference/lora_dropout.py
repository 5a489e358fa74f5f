"""LoRA Dropout in use: the mean of the masked product, W' = W + (alpha / r) (1 - p)^2 B A."""


def weight(W, p, f):
    return W + f.alpha / f.r * (1 - f.p) ** 2 * p.B.T @ p.A
