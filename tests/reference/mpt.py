"""MPT: X = [P * sum_k u_k v_k^T; E(x)], attended to by every token; its own outputs are dropped."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    p = parts[0]
    tokens = p.P * sum(torch.outer(p.maker_u[:, k], p.maker_v[k]) for k in range(f.r))
    text = model.get_input_embeddings()(batch["input_ids"])
    ones = torch.ones(len(text), f.length, dtype=torch.long)
    mask = torch.cat([ones, batch["attention_mask"]], 1)
    x = torch.cat([tokens.expand(len(text), -1, -1), text], 1)
    return model(inputs_embeds=x, attention_mask=mask).logits[:, f.length :]
