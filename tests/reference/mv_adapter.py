"""MV-Adapter: videos one by one, their frames' [CLS] by torch's attention; texts by the same block over the words."""

import torch
from torch.nn.functional import layer_norm, linear, multi_head_attention_forward

MODELS = ("llama", "vit", "clip")


def gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def block(z, p, f, hidden, mask):
    def norm(x, i):
        return layer_norm(x, x.shape[-1:], p.T_T_gain[i], p.T_T_shift[i])

    x = norm(z, 0).transpose(0, 1)
    more = {"key_padding_mask": hidden, "attn_mask": mask, "need_weights": False}
    maps = (p.T_T_qkv, p.T_T_qkv_bias, None, None, False, 0.0, p.T_T_o, p.T_T_o_bias)
    z = z + multi_head_attention_forward(x, x, x, z.shape[2], f.heads, *maps, **more)[0].transpose(0, 1)
    return z + linear(gelu(linear(norm(z, 1), p.T_T_up, p.T_T_up_bias)), p.T_T_down, p.T_T_down_bias)


def text(z, p, f, real):
    n = z.shape[1]
    z = layer_norm(z + p.T_p[real.cumsum(1) - 1], z.shape[-1:], p.T_gain, p.T_shift)
    mask = torch.full((n, n), -torch.inf, dtype=z.dtype).triu(1)
    hidden = torch.zeros(real.shape, dtype=z.dtype).masked_fill(real == 0, -torch.inf)
    return gelu(block(z, p, f, hidden, mask))


def video(z, p, f):
    """Take one video, `[frames, tokens, w]`."""
    z = gelu(z)
    rows = torch.stack([p.T_g, *(frame[0] for frame in z), *(frame[1:].mean(0) for frame in z)])
    s = layer_norm(rows + p.T_p, rows.shape[-1:], p.T_gain, p.T_shift)[None]
    s = gelu(block(s, p, f, None, None))[0]
    out = []
    for i, frame in enumerate(z):
        cls, patch = s[1 + i], s[1 + len(z) + i]
        seen = torch.cat([cls + patch, p.T_G @ s[0] + p.T_h])
        a = p.T_B @ torch.relu(p.T_A @ seen + p.T_e) + 1
        out.append(torch.cat([(a * cls)[None], frame[1:]]))
    return torch.stack(out)


def output(x, y, p, f, real):
    D = p.D if not hasattr(p, "v") else torch.diag(p.M @ p.v + p.m) @ p.D
    z = y @ D.T + p.b
    if hasattr(p, "T_g"):
        z = torch.cat([video(part, p, f) for part in z.split(f.frames)])
    else:
        z = text(z, p, f, real)
    return y + f.scale * (z @ p.U.T + p.c)
