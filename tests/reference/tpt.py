"""TPT: the tokens of a bank that are nearest to the largest embedded values, in front of the text."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    B, text = parts[0].B, model.get_input_embeddings()(batch["input_ids"])
    rows = []
    for m in text[:, 0]:  # the labels of this batch begin at the second token
        order = torch.argsort((B * m).sum(1), descending=True)[: f.length]
        rows.append(torch.stack([B[i] for i in sorted(order.tolist())]))
    mask = torch.cat([torch.ones(len(text), f.length, dtype=torch.long), batch["attention_mask"]], 1)
    return model(inputs_embeds=torch.cat([torch.stack(rows), text], 1), attention_mask=mask).logits[:, f.length :]
