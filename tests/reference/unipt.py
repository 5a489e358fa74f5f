"""UniPT: h_L + U ReLU(sum_i c_i m_i), m_i = n(ReLU(a t_i)) t_i + t_i[first], c = softmax(g (a[first] * mean t_i))."""

import torch

MODELS = ("llama",)


def token(tensors, a, first, p):
    """What a token gets: t_0 .. t_L of those that it sees, its own anchor, and that of the first."""
    m, s = [], []
    for t in tensors:
        near = (t @ a).relu()
        m.append((near / near.sum().clamp(min=1e-6)) @ t + t[0])
        s.append(p.g @ (first * t.mean(0)))
    weight = torch.cat(s).softmax(0)
    return p.U @ sum(w * x for w, x in zip(weight, m, strict=True)).relu() + p.c


def run(model, batch, parts, f):
    p, taps, mask = parts[0], [], batch["attention_mask"]
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, a, y: taps.append(y))
    model.model.layers[0].register_forward_pre_hook(lambda m, a: taps.append(a[0]))
    model(input_ids=batch["input_ids"], attention_mask=mask)
    t = [h.relu() @ p.D[i].T + p.b[i] for i, h in enumerate(taps)]
    a = taps[-1].relu() @ p.D[-1].T + p.b[-1]
    made = taps[-1].clone()
    for row, real in enumerate(mask.bool()):
        for i in range(len(real)):
            seen = real[: i + 1].nonzero().flatten()
            made[row, i] += token([x[row, seen] for x in t], a[row, i], a[row, seen[0]], p)
    return model.lm_head(model.model.norm(made))
