"""MOA: two LoRAs weighted by what the mean of the prompt looks like."""

import torch


def output(x, y, p, f, real):
    m = []
    for row, n in zip(x, real.sum(1).tolist(), strict=True):
        n = 1 if p.path.startswith("model.") else n  # a decoder's labels begin at the second token
        m.append(row[:n].mean(0))
    share = torch.softmax(torch.stack(m) @ p.W.T, -1)
    pairs = [(p.members_0_A, p.members_0_B), (p.members_1_A, p.members_1_B)]
    return y + sum(share[:, k, None, None] * (x @ A.T @ B) for k, (A, B) in enumerate(pairs))
