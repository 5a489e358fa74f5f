"""Tiny-Attention: attention over the sub-layer's output, with few units, added to it."""

import torch


def output(x, y, p, f, real):
    q, k, v = (y @ w.T for w in p.qkv.chunk(3))
    n, hidden = y.shape[1], (real == 0)[:, None, None, :]
    heads = [t.view(len(y), n, f.heads, f.head_dim).transpose(1, 2) for t in (q, k, v)]
    score = heads[0] @ heads[1].transpose(2, 3) / f.head_dim**0.5
    if p.path.startswith("model."):  # the decoder
        hidden = hidden | torch.ones(n, n, dtype=torch.bool).triu(1)
    seen = torch.softmax(score.masked_fill(hidden, -torch.inf), -1).nan_to_num() @ heads[2]
    return y + seen.transpose(1, 2).flatten(2) @ p.o.T
