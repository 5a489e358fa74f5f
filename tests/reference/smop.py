"""SMoP: the tokens of the likeliest prompt times its probability, in front of the text."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    p, text = parts[0], model.get_input_embeddings()(batch["input_ids"])
    m = text[:, 0]  # the labels of this batch begin at the second token
    share = torch.softmax(m @ p.W.T, -1)
    rows = [share[i, j] * p.P[j] for i, j in enumerate(share.argmax(-1).tolist())]
    mask = torch.cat([torch.ones(len(text), f.length, dtype=torch.long), batch["attention_mask"]], 1)
    return model(inputs_embeds=torch.cat([torch.stack(rows), text], 1), attention_mask=mask).logits[:, f.length :]
