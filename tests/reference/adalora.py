"""AdaLoRA: W' = W + alpha / (r + 1e-5) P diag(E) Q, P [out, r] (kept as its transpose), Q [r, in]."""


def weight(W, p, f):
    return W + f.alpha / (f.r + 1e-5) * p.P.T @ p.E.diag() @ p.Q
