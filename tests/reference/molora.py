"""MoLoRA: y = W x + (alpha / r) sum_e softmax(W_g x)_e B_e A_e x for every token."""


def output(x, y, p, f):
    gate = (x @ p.router_W.T).softmax(-1)
    for e in range(f.experts):
        A, B = (t[e * f.r : (e + 1) * f.r] for t in (p.A, p.B))
        y = y + f.alpha / f.r * gate[..., e : e + 1] * (x @ A.T @ B)
    return y
