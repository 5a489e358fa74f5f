"""AdaMix in evaluation: h + U GELU(D h + b) + c with the means of the experts' tensors."""

from torch.nn.functional import gelu


def output(x, y, p, f):
    D, b, U, c = (t.mean(0) for t in (p.all_down, p.all_down_bias, p.all_up, p.all_up_bias))
    return y + gelu(y @ D.T + b) @ U.T + c
