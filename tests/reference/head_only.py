"""Linear probe: the head's weight and bias are trained ones."""


def weight(W, p, f):
    return p.value


def bias(b, p, f):
    return p.offset
