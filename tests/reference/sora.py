"""SoRA: W' = W + (alpha / r) B diag(g) A."""


def weight(W, p, f):
    return W + f.alpha / f.r * p.B.T @ p.g.diag() @ p.A
