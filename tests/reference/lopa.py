"""LoPA: tokens P, gated by the sigmoid of u v^T with u and v from the mean of what is embedded and not scored."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    p, text = parts[0], model.get_input_embeddings()(batch["input_ids"])
    m = text[:, 0]  # the labels of this batch begin at the second token
    u = (torch.tanh(m @ p.W1_0.T + p.b1_0) @ p.W2_0.T + p.b2_0).view(len(m), -1, f.r)
    v = (torch.tanh(m @ p.W1_1.T + p.b1_1) @ p.W2_1.T + p.b2_1).view(len(m), -1, f.r)
    P = p.P / (1 + torch.exp(-torch.einsum("blr,bdr->bld", u, v)))
    mask = torch.cat([torch.ones(len(text), f.length, dtype=torch.long), batch["attention_mask"]], 1)
    return model(inputs_embeds=torch.cat([P, text], 1), attention_mask=mask).logits[:, f.length :]
