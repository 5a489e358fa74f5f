"""GaLore: W' = W_trained, every parameter at its own value; only how it is trained differs."""


def weight(W, p, f):
    return p.value
