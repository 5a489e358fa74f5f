"""MixLoRA: sum over the top experts of softmax, renormalised, times a feed-forward network with terms of its own."""

from torch.nn.functional import linear

import zoo


def low(x, A, B, f):
    return f.alpha / f.r * (x @ A.T @ B)


def expert(x, e, p, f, act, maps):
    """The gated or plain network of expert e: every map has its frozen output and the expert's term."""
    rows = slice(e * f.r, (e + 1) * f.r)

    def run(x, frozen, name):
        A, B = getattr(p, f"{name}_A"), getattr(p, f"{name}_B")
        return linear(x, frozen.weight, frozen.bias) + low(x, A[rows], B[rows], f)

    h = act(run(x, maps[0], "entering_0"))
    return run(h if len(maps) == 2 else h * run(x, maps[1], "entering_1"), maps[-1], "down")


def mixture(x, p, f, act, maps):
    share = (x @ p.router_W.T).softmax(-1)
    kept = share * (share >= share.sort(-1, descending=True).values[..., f.top - 1 : f.top])
    kept = kept / kept.sum(-1, keepdim=True)
    return sum(kept[..., e : e + 1] * expert(x, e, p, f, act, maps) for e in range(f.experts))


def run(model, batch, parts, f):
    for p in parts:
        module = model.get_submodule(p.path)
        if p.role != "ffn":
            module.register_forward_hook(lambda m, args, y, p=p: y + low(args[0], p.A, p.B, f))
        elif hasattr(module, "gate_proj"):
            maps = module.gate_proj, module.up_proj, module.down_proj
            module.forward = lambda x, p=p, act=module.act_fn, maps=maps: mixture(x, p, f, act, maps)
        else:
            first = model.bert.encoder.layer[p.layer].intermediate
            first.forward, maps, act = lambda x: x, (first.dense, module), first.intermediate_act_fn
            module.forward = lambda x, p=p, act=act, maps=maps: mixture(x, p, f, act, maps)
    return zoo.output("llama" if hasattr(model, "lm_head") else "bert_cls", model(**batch))
