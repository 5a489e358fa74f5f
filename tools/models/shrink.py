"""Makes a config small by the names of its fields: the same architecture with few layers, narrow, with few tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, INNER, VOCAB, LAYERS = 64, 4, 96, 128, 2
Rule = tuple[str, Callable[[int], int]]


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# Group -> pairs of a pattern for whole field names and what the number becomes; the first that fits counts.
RULES: dict[str, tuple[Rule, ...]] = {
    "layers": (
        (r"num_kv_shared_layers", _at_most(0)),
        (r"(first_k_dense_replace|num_nextn_predict_layers|num_mtp_.*|num_dense_layers)", _at_most(1)),
        (
            r"(num_|n_)?(encoder_|decoder_|hidden_|text_|vision_|main_|cross_|dense_|conformer_)*(layers?|depth)",
            _at_most(LAYERS),
        ),
        (
            r"(num|n)_(\w+_)?(encoder|decoder|hidden|transformer|resampler|perceiver|stage|adapter)_layers?",
            _at_most(LAYERS),
        ),
        (r"(encoder|decoder|depth|text|vision|audio|num|n)_(num_)?(hidden_)?(layers|blocks|depth)", _at_most(LAYERS)),
        (r"num_\w+_per_block", _at_most(LAYERS)),
        (r"\w*(_period|_interval|_every_n_layers|_every_n|layer_freq|_step|_pattern|_stride_layers)", _at_most(2)),
        (r"\w*_layer_offset", _at_most(1)),
    ),
    "heads": (
        (
            r"(num_key_value_heads|n_kv_heads?|num_kv_heads|multi_query_group_num|swa_num_key_value_heads)",
            _at_most(2),
        ),
        (r"(\w*_)?(num_)?(\w*_)?(attention_)?heads?", _at_most(HEADS)),
        (r"(n_head|n_heads|num_head|mamba_n_heads|nhead)", _at_most(HEADS)),
    ),
    "head_dim": (
        (
            r"(qk_nope_head_dim|qk_rope_head_dim|rope_head_dim|nope_head_dim|qk_pos_emb_head_dim)",
            _at_most(WIDTH // HEADS // 2),
        ),
        (
            r"(\w*_)?(head_dim|head_size|d_kv|kv_channels|d_head|attention_head_size|query_pre_attn_scalar|dim_head)",
            _at_most(WIDTH // HEADS),
        ),
        (r"(rotary_dim|rotary_ndims|qk_head_dim|v_head_dim|d_qk|d_v)", _at_most(WIDTH // HEADS)),
    ),
    "width": (
        (r"base_channels", _at_most(32)),
        (r"(num_filters|n_filters)", _at_most(8)),
        (r"(q_lora_rank|kv_lora_rank|o_lora_rank|\w*low_rank\w*)", _at_most(16)),
        (
            r"(embedding_size|hidden_size|d_model|dim|n_embd|emb_dim|embed_dim|d_latents|\w*_groups|model_dim|width|word_embed_proj_dim)",
            _at_most(WIDTH),
        ),
        (
            r"\w*(hidden_size|d_model|embed_dim|embedding_size|projection_dim|proj_dim|projection_size|hidden_dim)",
            _at_most(WIDTH),
        ),
        (
            r"(lru_width|out_hidden_size|mm_hidden_size|output_dim|input_dim|feature_size|\w*_embed_size)",
            _at_most(WIDTH),
        ),
    ),
    "inner": (
        (r"moe_intermediate_size|\w*expert\w*intermediate_size|expert_hidden_dim", _at_most(32)),
        (
            r"\w*(intermediate_size|ffn_dim|inner_dim|ffn_hidden_size|d_ff|feedforward_dim|n_inner|d_inner|mlp_dim)",
            _at_most(INNER),
        ),
    ),
    "vocab": ((r"\w*vocab_size|codebook_size|vocab_size_per_layer_input|\w*_vocab", _at_most(VOCAB)),),
    "positions": (
        (r"mm_tokens_per_image", _at_most(1)),
        (r"max_source_positions", _at_most(32)),
        (
            r"(max_position_embeddings|n_positions|n_ctx|max_target_positions|max_seq_len\w*|seq_length|max_2d_position_embeddings)",
            _at_most(256),
        ),
        (r"(num_queries|num_query_tokens|num_latents|num_object_queries|resampler_n_latents)", _at_most(8)),
    ),
    "experts": (
        (r"(n_group|topk_group|num_expert_group|num_limited_groups|router_n_groups?)", _at_most(1)),
        (
            r"(num_experts_per_tok\w*|moe_top_?k|top_k_experts|num_selected_experts|moe_k|experts_per_token|moe_topk)",
            _at_most(2),
        ),
        (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts)", _at_most(1)),
        (r"\w*(experts|num_local_experts)", _at_most(4)),
    ),
    "state": (
        (r"(mamba_|ssm_)?(state_size|d_state|ssm_state_size)", _at_most(8)),
        (r"(time_step_rank|mamba_dt_rank)", _at_most(4)),
    ),
}  # fmt: skip
# What a class needs a number for, though its config's default is None.
UNSET: dict[str, Any] = {
    "head_dim": WIDTH // HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_local_experts": 4,
}
UNSET |= {"vocab_size": VOCAB, "prediction_length": 4, "moe_intermediate_size": 32, "image_token_id": VOCAB - 29}
UNSET |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
UNSET |= {"indexer_compress_ratio": 4, "image_token_index": VOCAB - 29, "vocabulary_map": {"<image>": VOCAB - 29}}
UNSET |= {"n_shared_experts": 1, "top_k_experts": 2}
UNSET |= {"moe_topk": 2, "num_experts": 4, "num_key_value_heads": 2, "qk_rope_head_dim": 8, "pad_token_id": 0}
LISTS = r"(hidden_sizes|embed_dims?|channels|conv_dim|\w*hidden_sizes|dims|num_channels_list|tdnn_dim)"
TOKENS = re.compile(r"\w*(token|tok)_?(id|ids|index)\w*|(bos|eos|pad|sep|cls|mask|unk)_?\w*_id\w*|image_token_index")


def default(config_class: Any) -> Any:
    """Return a config of its defaults."""
    return config_class()


def shrunk(config: Any, skip: frozenset[str] = frozenset(), fresh: bool = True, unset: bool = False) -> Any:
    """Return a small config.

    Args:
        config: one of defaults; it is not changed.
        skip: groups of RULES left as they are; also `image`, `lists` and `tokens`.
        fresh: make it again from the changed fields, so that what depends on them follows; else set the fields.
        unset: give a number to fields that have none (UNSET).
    """
    return _small(config, skip, fresh, unset, {})


def _small(config: Any, skip: frozenset[str], fresh: bool, unset: bool, tokens: dict[int, int]) -> Any:
    changed: dict[str, Any] = {}
    usual = vars(type(config)()) if fresh else {}
    for key, value in _fields(config):
        if fresh and _follows(config, key):
            continue
        if isinstance(value, PreTrainedConfig):
            changed[key] = _small(value, skip, fresh, unset, tokens)
        else:
            new = _changed(config, key, value, skip, tokens)
            if new is not None and new != value:
                changed[key] = new
            elif fresh and key in usual and value != usual[key]:
                changed[key] = value
    changed |= _lists_of_layers(config, changed) | _expanded(config, changed)
    if "kv_lora_rank" in vars(config) and "num_attention_heads" in changed and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]  # latent attention has no groups of heads
    changed |= {k: v for k, v in UNSET.items() if unset and k in vars(config) and vars(config)[k] is None}
    changed |= _of_layers(config, changed) if unset else {}
    if fresh:
        return type(config)(**changed)
    for key, value in changed.items():
        setattr(config, key, value)
    return config


def _follows(config: Any, key: str) -> bool:
    """Return whether the class works a field out from others: it has no default, and a value."""
    field = getattr(type(config), "__dataclass_fields__", {}).get(key)
    return field is None or (field.default is None and not isinstance(vars(config)[key], PreTrainedConfig | dict))


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Return the fields of a config that are numbers, lists, dicts or configs."""
    for key, value in list(vars(config).items()):
        if not key.startswith("_") and isinstance(value, int | float | list | tuple | dict | PreTrainedConfig):
            yield key, value


def _changed(config: Any, key: str, value: Any, skip: frozenset[str], tokens: dict[int, int]) -> Any:
    """Return the new value of one field, or None."""
    if "tokens" not in skip and TOKENS.fullmatch(key):
        return _token(value, tokens)
    if "image" not in skip and key in ("image_size", "input_size", "img_size", "crop_size"):
        return _image(config, value)
    if key == "rope_parameters" and "head_dim" not in skip and isinstance(value, dict):
        return _rotary(config, value)
    if isinstance(value, list | tuple) and "lists" not in skip:
        return _list(key, value)
    if key.endswith(("width_coefficient", "depth_coefficient")) and "width" not in skip:
        return min(value, WIDTH / 1280)  # EfficientNet's: 1280 channels times this are its last width
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if key == "num_key_value_heads" and "kv_lora_rank" in vars(config):
        key = "num_attention_heads"  # every head has keys of its own: other counts are none of that attention
    for group, rules in RULES.items():
        for pattern, rule in rules:
            if re.fullmatch(pattern, key):
                return None if group in skip else rule(value)
    return None


def _expanded(config: Any, changed: dict[str, Any]) -> dict[str, Any]:
    """Return as many heads of a state space as fill its expanded width."""
    own = {**vars(config), **changed}
    known = [own.get(key) for key in ("hidden_size", "expand", "head_dim", "num_heads")]
    if not all(isinstance(value, int) for value in known):
        return {}
    width, times, size, _ = (int(value or 0) for value in known)
    return {"num_heads": width * times // size}


def _of_layers(config: Any, changed: dict[str, Any]) -> dict[str, Any]:
    """Return a kind for each layer where the config leaves the kinds to its user."""
    own = {**vars(config), **changed}
    count = own.get("num_hidden_layers")
    kinds = {"layer_types": "full_attention", "mlp_layer_types": "dense"}
    out: dict[str, Any] = {k: [v] * count for k, v in kinds.items() if isinstance(count, int) and own.get(k, 0) is None}
    kept = own.get("layer_types")
    if isinstance(kept, list) and own.get("rope_parameters", 0) == {}:
        turned = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _sections(WIDTH // HEADS // 2)}
        out["rope_parameters"] = dict.fromkeys(kept, turned)
    return out


def _token(value: Any, tokens: dict[int, int]) -> Any:
    """Return a token id within the small vocabulary: equal ids stay equal, different ones different."""
    if isinstance(value, list | tuple):
        return type(value)(_token(v, tokens) for v in value)
    if isinstance(value, bool) or not isinstance(value, int) or value < VOCAB - 28:
        return value
    return tokens.setdefault(value, VOCAB - 1 - len(tokens))


def _rotary(config: Any, value: dict[str, Any]) -> Any:
    """Return rotary parameters whose sections for time, height and width fill half of the small heads."""
    if not value or "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()):
        return None
    factor = value.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    return value | {"mrope_section": _sections(int(WIDTH // HEADS * factor) // 2)}


def _sections(half: int) -> list[int]:
    side = -(-half // 3)
    return [side, side, half - 2 * side]


def _image(config: Any, value: Any) -> Any:
    patch = vars(config).get("patch_size")
    side = patch[0] if isinstance(patch, list | tuple) else patch
    stages = any(key in vars(config) for key in ("depths", "hidden_sizes", "num_stages"))
    small = 64 if stages or not isinstance(side, int) else max(32 // side, 2) * side
    if isinstance(value, int):
        return min(value, small)
    if isinstance(value, list | tuple) and all(isinstance(v, int) for v in value):
        return type(value)(min(v, small) for v in value)
    return None


def _list(key: str, value: Any) -> Any:
    """Return the widths of stages divided by 8, and the depths of stages of 2 at most."""
    if not value or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return None
    if re.fullmatch(r"(num_)?(attention_)?heads?", key):
        return type(value)(2 ** (min(v, HEADS).bit_length() - 1) for v in value)
    if key in ("depths", "num_blocks", "layers"):
        return type(value)(min(v, 2) for v in value)
    if re.fullmatch(LISTS, key) and all(v % 8 == 0 and v >= 32 for v in value):
        return type(value)(v // 8 for v in value)
    return None


def _lists_of_layers(config: Any, changed: dict[str, Any]) -> dict[str, Any]:
    """Return lists with an entry for each layer cut to the new count, which grows so that every kind of layer stays."""
    own = vars(config)
    out: dict[str, Any] = {}
    for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):
        count, new = own.get(key), changed.get(key)
        if not isinstance(count, int) or not isinstance(new, int):
            continue
        rows = {
            k: v for k, v in own.items() if isinstance(v, list | tuple) and len(v) == count and not k.startswith("_")
        }
        for values in rows.values():
            kinds = {str(v) for v in values}
            first = [next(i for i, v in enumerate(values) if str(v) == kind) for kind in kinds]
            new = max(new, max(first) + 1) if len(kinds) <= 4 and max(first) < 8 else new
        out[key] = new
        out |= {k: changed.get(k, values)[:new] for k, values in rows.items()}
    return out
