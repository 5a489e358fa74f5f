"""UniPELT: prefix, bottleneck and low-rank term, each times a gate.

The gate is the mean over real tokens of sigmoid(w z + b), z what the part reads.
"""

import torch
from transformers import DynamicCache

MODELS = ("llama",)


def gate(z, w, b, real):
    return ((torch.sigmoid(z @ w + b) * real).sum(1) / real.sum(1))[:, None, None]


def output(x, y, p, f, real):
    if p.role == "ffn.down":
        return y + gate(y, p.gate_w, p.gate_b, real) * (
            (y @ p.inner_down.T + p.inner_down_bias).relu() @ p.inner_up.T + p.inner_up_bias
        )
    scale = f.lora.alpha / f.lora.r
    return y + gate(x, p.gate_w, p.gate_b, real) * scale * (x @ p.inner_A.T @ p.inner_B)


def run(model, batch, parts, f):
    n, cache = len(batch["input_ids"]), DynamicCache()
    for layer, p in enumerate(p for p in parts if p.role == "attn"):
        memory = p.inner_P.transpose(1, 2)[:, None].expand(-1, n, -1, -1, -1)
        cache.update(*memory, layer)

        def scaled(module, args, kwargs, layer=layer, p=p, memory=memory):
            g = gate(kwargs["hidden_states"], p.gate_net_w, p.gate_net_b, batch["attention_mask"])[..., None]
            cache.layers[layer].keys, cache.layers[layer].values = g * memory[0], g * memory[1]

        model.get_submodule(p.path).register_forward_pre_hook(scaled, with_kwargs=True)
    mask = torch.cat([torch.ones(n, f.prefix_tuning.length, dtype=torch.long), batch["attention_mask"]], 1)
    return model(input_ids=batch["input_ids"], attention_mask=mask, past_key_values=cache).logits
