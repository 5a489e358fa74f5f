"""KAdaptation: W' = W + sum_i (a_i b_i^T) (x) (u_i v_i^T)."""

from torch import kron, outer


def weight(W, p, f):
    return W + sum(kron(outer(p.a[i], p.b[i]), outer(p.u[i], p.v[i])) for i in range(len(p.a)))
