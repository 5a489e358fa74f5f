"""MAM: prefixes made by tanh(E W1 + b1) W2 + b2 in attention, a scaled parallel bottleneck beside the FFN."""

from types import SimpleNamespace

import torch

from reference import parallel_adapter, prefix_tuning

MODELS, READS = ("llama",), "input"


def output(x, y, p, f):
    return parallel_adapter.output(x, y, p, f.parallel_adapter)


def run(model, batch, parts, f):
    made = [torch.tanh(p.E @ p.W1.T + p.b1) @ p.W2.T + p.b2 for p in parts if p.role == "attn"]
    shaped = [
        SimpleNamespace(P=m.view(f.prefix_tuning.length, 2, p.kv_heads, -1).transpose(0, 1))
        for m, p in zip(made, parts, strict=False)
    ]
    return prefix_tuning.run(model, batch, shaped, f.prefix_tuning)
