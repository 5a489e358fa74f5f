"""DoRA: W' = g (W + s B A) / |W + s B A|, the norm over a unit's inputs and constant in the gradient."""


def weight(W, p, f):
    V = W + f.alpha / f.r * p.B.T @ p.A
    return p.g[:, None] * V / V.detach().square().sum(1, keepdim=True).sqrt()
