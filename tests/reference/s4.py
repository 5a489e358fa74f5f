"""S4 on two layers: a bottleneck after each FFN, prefixes in both, biases in the second, low rank in the first."""

from torch.nn.functional import gelu

from reference import prefix_tuning

MODELS = ("llama",)


def changed(x, y, p, f):
    if hasattr(p, "down"):
        return y + gelu(y @ p.down.T + p.down_bias) @ p.up.T + p.up_bias
    if hasattr(p, "db"):
        assert p.layer == 1
        return y + p.db
    assert p.layer == 0
    return y + f.lora.alpha / f.lora.r * x @ p.A.T @ p.B


def run(model, batch, parts, f):
    rest = [p for p in parts if p.role != "attn"]
    for p in sorted(rest, key=lambda p: hasattr(p, "down")):  # a bottleneck reads what the map with its bias gives
        model.get_submodule(p.path).register_forward_hook(lambda m, args, y, p=p: changed(args[0], y, p, f))
    return prefix_tuning.run(model, batch, [p for p in parts if p.role == "attn"], f.prefix_tuning)
