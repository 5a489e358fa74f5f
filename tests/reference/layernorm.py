"""LayerNorm tuning: g' = g + dg, b' = b + db."""


def weight(W, p, f):
    return W + p.value


def bias(b, p, f):
    return b + p.offset
