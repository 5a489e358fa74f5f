"""C3A: W' = W + C / in, every block b x b of C circulant: row t is the first row k moved by t to the right."""

import torch


def weight(W, p, f):
    rows = [[torch.stack([k.roll(t) for t in range(f.block)]) for k in line] for line in p.k]
    return W + torch.cat([torch.cat(line, 1) for line in rows]) / p.n
