"""Prefix tuning: Attn(Q, [P_k; K], [P_v; V]) in every layer, as a cache of l earlier tokens."""

import torch
from transformers import DynamicCache

MODELS = ("llama",)


def run(model, batch, parts, f):
    n = len(batch["input_ids"])
    cache = DynamicCache()
    for layer, p in enumerate(parts):
        cache.update(*p.P.transpose(1, 2)[:, None].expand(-1, n, -1, -1, -1), layer)
    mask = torch.cat([torch.ones(n, f.length, dtype=torch.long), batch["attention_mask"]], 1)
    return model(input_ids=batch["input_ids"], attention_mask=mask, past_key_values=cache).logits
