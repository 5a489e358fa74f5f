"""DePT: a short prompt, and a low-rank table of places added to the embedded text."""

import torch

MODELS = ("llama",)


def run(model, batch, parts, f):
    prompt, table = (next(p for p in parts if p.role == role) for role in ("stack", "embed"))
    text = model.get_input_embeddings()(batch["input_ids"])
    place = batch["attention_mask"].cumsum(1) - 1  # what is padding stays at the place of the last token
    text = text + f.alpha / f.r**0.5 * (table.A @ table.B)[place]
    mask = torch.cat([torch.ones(len(text), f.length, dtype=torch.long), batch["attention_mask"]], 1)
    x = torch.cat([prompt.P.expand(len(text), -1, -1), text], 1)
    return model(inputs_embeds=x, attention_mask=mask).logits[:, f.length :]
