"""HiRA: W' = W + W * (B A), B [out, r] kept as its transpose."""


def weight(W, p, f):
    return W + W * (p.B.T @ p.A)
