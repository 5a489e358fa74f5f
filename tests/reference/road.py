"""RoAd: W' = R W, b' = R b; R turns outputs i and i + group / 2 of a group, an angle and a scale a row."""

import torch


def rotation(p, f):
    R = torch.zeros(p.m, p.m)
    for i in range(p.m):
        first = i % f.group < f.group // 2
        pair = i + f.group // 2 if first else i - f.group // 2
        entries = (p.a[i] * p.t[i].cos(), p.a[i] * p.t[i].sin() * (-1 if first else 1))
        R = R.index_put((torch.tensor([i, i]), torch.tensor([i, pair])), torch.stack(entries))
    return R


def weight(W, p, f):
    return rotation(p, f) @ W


def bias(b, p, f):
    return rotation(p, f) @ b
