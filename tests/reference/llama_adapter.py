"""LLaMA-Adapter: y = Attn(x) + g softmax(Q K_p^T / sqrt(d_h)) V_p W_o, K_p, V_p = W_k P, W_v P without positions."""

from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

MODELS = ("llama",)


def output(x, y, p, f, module, kwargs):
    heads = lambda t: t.view(*t.shape[:-1], -1, module.head_dim).transpose(-2, -3)  # noqa: E731
    Q = heads(module.q_proj(x))
    Q, _ = apply_rotary_pos_emb(Q, Q, *kwargs["position_embeddings"])
    K, V = (heads(w(p.P)).repeat_interleave(module.num_key_value_groups, 0) for w in (module.k_proj, module.v_proj))
    read = (Q @ K.mT / module.head_dim**0.5).softmax(-1) @ V
    return y[0] + p.g * module.o_proj(read.transpose(1, 2).flatten(2)), *y[1:]
