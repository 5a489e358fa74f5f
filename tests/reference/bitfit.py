"""BitFit: b' = b + db."""


def bias(b, p, f):
    return b + p.db
