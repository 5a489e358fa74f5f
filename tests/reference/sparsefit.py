"""SparseFit: the weights and biases of query maps and norms are trained ones."""


def weight(W, p, f):
    return p.value


def bias(b, p, f):
    return p.offset
