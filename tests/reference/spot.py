"""SPoT: [P; E(x)], as prompt tuning."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    text = model.get_input_embeddings()(batch["input_ids"])
    x = torch.cat([parts[0].members_0_P.expand(len(text), -1, -1), text], 1)
    mask = torch.cat([torch.ones(len(text), f.length, dtype=torch.long), batch["attention_mask"]], 1)
    return model(inputs_embeds=x, attention_mask=mask).logits[:, f.length :]
