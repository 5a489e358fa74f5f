"""DeLoRA: W' = W + (l / r) ||W|| * sum_i b_i a_i^T / (|b_i| |a_i|), norms of W's columns; B transposed."""


def weight(W, p, f):
    term = sum(b[:, None] * a / (b.norm() * a.norm()) for a, b in zip(p.A, p.B, strict=True))
    return W + p.l / f.r * term * W.square().sum(0).sqrt()
