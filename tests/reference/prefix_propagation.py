"""Prefix-propagation: tokens in front, to which a learned vector is added before every layer."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    P, n = parts[0].P, f.length

    def add(layer, args, j):
        return torch.cat([args[0][:, :n] + P[j], args[0][:, n:]], 1), *args[1:]

    for j, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda m, args, j=j: add(m, args, j))
    text = model.get_input_embeddings()(batch["input_ids"])
    mask = torch.cat([torch.ones(len(text), n, dtype=torch.long), batch["attention_mask"]], 1)
    x = torch.cat([torch.zeros(len(text), n, text.shape[2]), text], 1)
    return model(inputs_embeds=x, attention_mask=mask).logits[:, n:]
