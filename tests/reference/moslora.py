"""MoSLoRA: W' = W + (alpha / r) B M A, A [r, in], M [r, r], B [out, r] (kept as its transpose)."""


def weight(W, p, f):
    return W + f.alpha / f.r * p.B.T @ p.M @ p.A
