"""LoRA-GA: W' = W - s B0 A0 + s B A, s = alpha / sqrt(r), A0 and B0 as the gradient gave them."""


def weight(W, p, f):
    s = f.alpha / f.r**0.5
    return W - s * p.B0.T @ p.A0 + s * p.B.T @ p.A
