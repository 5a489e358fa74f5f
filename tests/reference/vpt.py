"""VPT deep: x_j = [cls; P_j; patches] before every layer j, prompt outputs dropped after the last."""

import torch

MODELS = ("vit",)


def run(model, batch, parts, f):
    P, vit = parts[0].P, model.vit
    x = vit.embeddings(batch["pixel_values"])
    for j, layer in enumerate(vit.layers):
        rest = x[:, 1 + (f.length if j else 0) :]
        x = layer(torch.cat([x[:, :1], P[j].expand(len(x), -1, -1), rest], 1))
    return model.classifier(vit.layernorm(x)[:, 0])
