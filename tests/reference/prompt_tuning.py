"""Prompt tuning: X = [P; E(x)], attended to by every token; its own outputs are dropped."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    text = model.get_input_embeddings()(batch["input_ids"])
    x = torch.cat([parts[0].P.expand(len(text), -1, -1), text], 1)
    ones = torch.ones(len(text), f.length, dtype=torch.long)
    mask = torch.cat([ones, batch["attention_mask"]], 1)
    return model(inputs_embeds=x, attention_mask=mask).logits[:, f.length :]
