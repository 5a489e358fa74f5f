"""SK-Tuning: X = [P; E(x)], P the embeddings of the phrase as training has moved them; evaluated without dropout."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    text, (part,) = model.get_input_embeddings()(batch["input_ids"]), parts
    rows = [torch.cat([part.P, row]) for row in text]
    real = torch.nn.functional.pad(batch["attention_mask"], (len(f.ids.split()), 0), value=1)
    return model(inputs_embeds=torch.stack(rows), attention_mask=real).logits[:, len(part.P) :]
