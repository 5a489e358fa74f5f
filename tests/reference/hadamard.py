"""Hadamard adapter: A' = w * A + b at the attention's output; g' = g + dg, b' = b + db in norms."""


def output(x, y, p, f):
    return y if p.role == "norm" else p.scale * y + p.shift


def weight(W, p, f):
    return W + p.value if p.role == "norm" else W


def bias(b, p, f):
    return b + p.offset if p.role == "norm" else b
