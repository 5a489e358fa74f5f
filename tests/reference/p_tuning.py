"""P-tuning: X = [MLP(BiLSTM(E)); E(x)]; the LSTM cell by its four gates i, f, g, o."""

import torch

MODELS = ("llama",)


def walk(x, p, end):
    W, U, b, c = (getattr(p, f"maker_lstm_{n}_{end}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    s = h = torch.zeros(U.shape[1])
    seen = []
    for row in x.flip(0) if end.endswith("reverse") else x:
        i, f, g, o = (W @ row + b + U @ h + c).chunk(4)
        s = f.sigmoid() * s + i.sigmoid() * g.tanh()
        h = o.sigmoid() * s.tanh()
        seen.append(h)
    return torch.stack(seen[::-1] if end.endswith("reverse") else seen)


def lstm(p):
    x = p.P
    for layer in range(2):
        x = torch.cat([walk(x, p, f"l{layer}"), walk(x, p, f"l{layer}_reverse")], 1)
    return (x @ p.maker_mlp_0_weight.T + p.maker_mlp_0_bias).relu() @ p.maker_mlp_2_weight.T + p.maker_mlp_2_bias


def mlp(p):
    x = (p.P @ p.maker_mlp_0_weight.T + p.maker_mlp_0_bias).relu()
    x = (x @ p.maker_mlp_2_weight.T + p.maker_mlp_2_bias).relu()
    return x @ p.maker_mlp_4_weight.T + p.maker_mlp_4_bias


def run(model, batch, parts, f):
    tokens = (lstm if f.encoder == "lstm" else mlp)(parts[0])
    text = model.get_input_embeddings()(batch["input_ids"])
    ones = torch.ones(len(text), f.length, dtype=torch.long)
    mask = torch.cat([ones, batch["attention_mask"]], 1)
    x = torch.cat([tokens.expand(len(text), -1, -1), text], 1)
    return model(inputs_embeds=x, attention_mask=mask).logits[:, f.length :]
