"""S-BitFit: b' = b + m * db."""


def bias(b, p, f):
    return b + p.mask * p.db
