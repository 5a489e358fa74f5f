"""HiWi on weights: W' = W + relu(W D^T) U^T."""


def weight(W, p, f):
    return W + (W @ p.D.T).relu() @ p.U.T
