"""IDPG: tokens made from the mean of what is embedded and not scored, in front of the text."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    p, text = parts[0], model.get_input_embeddings()(batch["input_ids"])
    M = text[:, 0]  # the labels of this batch begin at the second token
    h = torch.relu(M @ p.W1.T + p.b1)
    P = (h @ p.W2.T + p.b2).view(len(text), f.length, -1)
    mask = torch.cat([torch.ones(len(text), f.length, dtype=torch.long), batch["attention_mask"]], 1)
    return model(inputs_embeds=torch.cat([P, text], 1), attention_mask=mask).logits[:, f.length :]
