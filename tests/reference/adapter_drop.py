"""AdapterDrop: h + U ReLU(D h + b1) + b2 in the layers from number `drop` on, h in those before."""


def output(x, y, p, f):
    return y if p.layer < f.drop else y + (y @ p.down.T + p.down_bias).relu() @ p.up.T + p.up_bias
