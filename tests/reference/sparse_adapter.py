"""SparseAdapter: h + (U * m_U) ReLU((D * m_D) h + b1) + b2 with fixed masks of zeros and ones."""


def output(x, y, p, f):
    D, U = p.down * p.down_mask.float(), p.up * p.up_mask.float()
    return y + (y @ D.T + p.down_bias).relu() @ U.T + p.up_bias
