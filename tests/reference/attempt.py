"""ATTEMPT: the target prompt plus a mixture of three, by attention of the largest embedded values."""

import math

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    p, text = parts[0], model.get_input_embeddings()(batch["input_ids"])
    h = text[:, 0] @ p.down.T  # the labels of this batch begin at the second token
    q = (h / (1 + torch.exp(-h))) @ p.up.T
    q = (q - q.mean(1, keepdim=True)) / (q.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * p.gain + p.offset
    bank = [p.members_0_P, p.members_1_P, p.P]
    score = torch.stack([q @ P.max(0).values for P in bank], 1) / (math.e * q.shape[1])
    mixed = sum(s[:, None, None] * P for s, P in zip(torch.softmax(score, 1).unbind(1), bank, strict=True))
    mask = torch.cat([torch.ones(len(text), f.length, dtype=torch.long), batch["attention_mask"]], 1)
    return model(inputs_embeds=torch.cat([p.P + mixed, text], 1), attention_mask=mask).logits[:, f.length :]
