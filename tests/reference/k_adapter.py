"""K-Adapter: W [h_L; a_n] + e, a_j = x + U Enc(D x + b) + c with x = h_i + a_{j-1}, Enc post-norm layers as BERT's."""

import torch
from torch.nn.functional import gelu

MODELS = ("llama",)


def norm(x, gain, shift):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift


def block(x, p, i, heads, hidden):
    names = ("qkv", "o", "up", "down", "qkv_bias", "o_bias", "up_bias", "down_bias", "gain", "shift")
    t = {name: getattr(p, f"net_{i}_{name}") for name in names}
    both = (x @ t["qkv"].T + t["qkv_bias"]).chunk(3, -1)
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in both)
    a = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -1e9).softmax(-1) @ v
    x = norm(x + a.transpose(1, 2).flatten(2) @ t["o"].T + t["o_bias"], t["gain"][0], t["shift"][0])
    inner = gelu(x @ t["up"].T + t["up_bias"]) @ t["down"].T + t["down_bias"]
    return norm(x + inner, t["gain"][1], t["shift"][1])


def run(model, batch, parts, f):
    p, taps, mask = parts[0], [], batch["attention_mask"]
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, a, y: taps.append(y))
    model.model.layers[0].register_forward_pre_hook(lambda m, a: taps.append(a[0]))
    model(input_ids=batch["input_ids"], attention_mask=mask)
    hidden = torch.ones(2 * mask.shape[1:], dtype=torch.bool).triu(1) | (mask == 0)[:, None, None]
    a = 0
    for j, i in enumerate((0, 0, 1)):  # of two layers
        x = taps[i] + a
        s = x @ p.D[j].T + p.b[j]
        for k in range(f.depth):
            s = block(s, p, j * f.depth + k, f.heads, hidden)
        a = x + s @ p.U[j].T + p.c[j]
    return model.lm_head(model.model.norm(torch.cat([taps[-1], a], -1) @ p.W.T + p.e))
