"""rsLoRA: W' = W + (alpha / sqrt(r)) B A."""


def weight(W, p, f):
    return W + f.alpha / f.r**0.5 * p.B.T @ p.A
