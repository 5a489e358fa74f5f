"""PERFT-R: y = FFN(x) + sum over the top experts of softmax(W_g x) times (alpha / r) B A x."""

READS = "input"


def output(x, y, p, f):
    share = (x @ p.gate_W.T).softmax(-1)
    lowest = share.sort(-1, descending=True).values[..., f.top - 1 : f.top]
    for e in range(f.experts):
        A, B = (t[e * f.r : (e + 1) * f.r] for t in (p.terms_A, p.terms_B))
        g = share[..., e : e + 1] * (share[..., e : e + 1] >= lowest)
        y = y + g * (f.alpha / f.r) * (x @ A.T @ B)
    return y
