"""Simple, scalable adaptation: h' = h + U ReLU(D LN(h) + b1) + b2 on the output of a layer."""


def output(x, y, p, f):
    h = y[0] if isinstance(y, tuple) else y
    n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    new = h + ((n * p.gain + p.shift) @ p.down.T + p.down_bias).relu() @ p.up.T + p.up_bias
    return (new, *y[1:]) if isinstance(y, tuple) else new
