"""OrchMoE: LoRAs weighted by tasks that the mean of the prompt looks like."""

import torch


def output(x, y, p, f, real):
    m = []
    for row, n in zip(x, real.sum(1).tolist(), strict=True):
        n = 1 if p.path.startswith("model.") else n  # a decoder's labels begin at the second token
        m.append(row[:n].mean(0))
    task = torch.softmax(torch.stack(m) @ p.W.T, -1)
    skill = torch.sigmoid(p.Z) / torch.sigmoid(p.Z).sum(1, keepdim=True)
    out = y
    for k in range(f.skills):
        A, B = (t[k * f.r : (k + 1) * f.r] for t in (p.A, p.B))
        out = out + (task @ skill)[:, k, None, None] * (f.alpha / f.r) * (x @ A.T @ B)
    return out
