"""Scaled parallel adapter: y = FFN(x) + s (U ReLU(D x + b1) + b2), x the FFN's own input."""

READS = "input"


def output(x, y, p, f):
    return y + f.scale * ((x @ p.down.T + p.down_bias).relu() @ p.up.T + p.up_bias)
