"""PALs: attention in a small space beside each layer, added to what the layer returns."""

import torch


def output(x, y, p, f, real):
    y, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
    q, k, v = (x @ p.D.T @ w.T for w in p.qkv.chunk(3))
    n, hidden = y.shape[1], (real == 0)[:, None, None, :]
    heads = [t.view(len(y), n, f.heads, -1).transpose(1, 2) for t in (q, k, v)]
    score = heads[0] @ heads[1].transpose(2, 3) / (f.size // f.heads) ** 0.5
    if p.path.startswith("model."):  # the decoder
        hidden = hidden | torch.ones(n, n, dtype=torch.bool).triu(1)
    seen = torch.softmax(score.masked_fill(hidden, -torch.inf), -1).nan_to_num() @ heads[2]
    out = y + seen.transpose(1, 2).flatten(2) @ p.E.T
    return out if rest is None else (out, *rest)
