"""LoRA: W' = W + (alpha / r) B A, A [r, in], B [out, r] (kept as its transpose)."""


def weight(W, p, f):
    return W + f.alpha / f.r * p.B.T @ p.A
