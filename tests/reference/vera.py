"""VeRA: W' = W + diag(b) B diag(d) A; A [r, n_max], B [m_max, r] frozen, cut to the site."""


def weight(W, p, f):
    return W + p.b.diag() @ p.bases_B[: p.m] @ p.d.diag() @ p.bases_A[:, : p.n]
