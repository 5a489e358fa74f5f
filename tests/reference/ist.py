"""IST: W' = W + (alpha / r) B A; which layers train in a step is another matter."""


def weight(W, p, f):
    return W + f.alpha / f.r * p.B.T @ p.A
