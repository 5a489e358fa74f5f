"""LST: s_i = Block_i(m s_{i-1} + (1 - m) P_i h_i), m = sigmoid(a_i / T); h_L + U n(s_L) goes to the last norm."""

import torch
from torch.nn.functional import gelu

MODELS = ("llama",)
norm = lambda s, w: s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731


def block(s, p, i, heads, hidden):
    t = {name: getattr(p, f"net_{i}_{name}") for name in ("norm1", "norm2", "qkv", "o", "up", "down")}
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (norm(s, t["norm1"]) @ t["qkv"].T).chunk(3, -1))
    a = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -1e9).softmax(-1) @ v
    s = s + a.transpose(1, 2).flatten(2) @ t["o"].T
    return s + gelu(norm(s, t["norm2"]) @ t["up"].T) @ t["down"].T


def run(model, batch, parts, f):
    p, taps, mask = parts[0], [], batch["attention_mask"]
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, a, y: taps.append(y))
    model.model.layers[0].register_forward_pre_hook(lambda m, a: taps.append(a[0]))
    model(input_ids=batch["input_ids"], attention_mask=mask)
    future = torch.ones(2 * mask.shape[1:], dtype=torch.bool).triu(1)
    s = taps[0] @ p.P[0].T + p.b[0]
    for i in range(len(taps) - 1):
        m = torch.sigmoid(p.a[i] / f.temperature)
        s = m * s + (1 - m) * (taps[i + 1] @ p.P[i + 1].T + p.b[i + 1])
        s = block(s, p, i, p.heads, future | (mask == 0)[:, None, None])
    return model.lm_head(model.model.norm(taps[-1] + norm(s, p.n_) @ p.U.T + p.c))
