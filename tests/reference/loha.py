"""LoHa: W' = W + (alpha / r) (B1 A1) * (B2 A2), the product entry by entry."""


def weight(W, p, f):
    return W + f.alpha / f.r * (p.B1 @ p.A1) * (p.B2 @ p.A2)
