"""VB-LoRA: W' = W + B A, parts of A and B mixed from a bank by the k largest logits."""

import torch


def part(logits, bank, k):
    least = logits.sort().values[-k]
    w = torch.where(logits >= least, logits.exp(), 0.0)
    return w @ bank / w.sum()


def weight(W, p, f):
    A = torch.stack([torch.cat([part(one, p.bank_vectors, f.k) for one in row]) for row in p.A_logits])
    B = torch.cat([torch.stack([part(one, p.bank_vectors, f.k) for one in rows], 1) for rows in p.B_logits])
    return W + B @ A
