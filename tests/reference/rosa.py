"""RoSA: W' = W + (alpha / r) B A + S, S zero but for the chosen entries of (site, row, column)."""

from torch.func import functional_call


def run(model, batch, parts, f):
    changed, half = {}, len(parts) // 2
    for site, (low, p) in enumerate(zip(parts[:half], parts[half:], strict=True)):
        mine = p.entries_where[0] == site
        added = f.lora.alpha / f.lora.r * low.B.T @ low.A
        S = added.index_put(tuple(p.entries_where[1:, mine].long()), p.entries_values[mine], accumulate=True)
        changed[f"{p.path}.weight"] = model.get_parameter(f"{p.path}.weight") + S
    return functional_call(model, changed, kwargs=batch).logits
