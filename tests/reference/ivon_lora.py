"""IVON-LoRA at the mean: W' = W + (alpha / r) B A."""


def weight(W, p, f):
    return W + f.alpha / f.r * p.B.T @ p.A
