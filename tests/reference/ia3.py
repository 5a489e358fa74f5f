"""(IA)3: keys and values times l, the input of the FFN's down projection times l; into rows and columns of W."""


def weight(W, p, f):
    return W * p.scale if p.role == "ffn.down" else p.scale[:, None] * W


def bias(b, p, f):
    return b if p.role == "ffn.down" else p.scale * b
