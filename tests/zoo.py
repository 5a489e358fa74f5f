"""Tiny random models of many families, their input batches and their main outputs, for tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB, HIDDEN, INNER, LAYERS, HEADS, LENGTH, PIXELS = 64, 32, 48, 2, 4, 7, 16
PAD, BOS, EOS, IMAGE = 0, 1, 2, 5
SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
STILL: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA: dict[str, Any] = (
    SHAPE
    | SPECIAL
    | {
        "vocab_size": VOCAB,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
)
BERT: dict[str, Any] = (
    SHAPE
    | STILL
    | {
        "vocab_size": VOCAB,
        "max_position_embeddings": 40,
        "pad_token_id": PAD,
        "num_labels": 3,
    }
)
IMAGE_SHAPE: dict[str, Any] = SHAPE | {"image_size": PIXELS, "patch_size": 8}
VIT: dict[str, Any] = IMAGE_SHAPE | STILL | {"num_labels": 3}
CLIP_TEXT: dict[str, Any] = SHAPE | {"vocab_size": VOCAB, "max_position_embeddings": 16}
CLIP_TEXT |= {"eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": PAD}
QUIET: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BART: dict[str, Any] = SPECIAL | {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "max_position_embeddings": 40,
    "decoder_start_token_id": BOS,
}


def _make(model: str, config: str, **fields: Any) -> nn.Module:
    """Build transformers' class `model` from `config(**fields)`, fixed weights, eval mode."""
    settings = getattr(tf, config)(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: nn.Module = getattr(tf, model)(settings)
        # Fresh models start biases at 0 and norms at 1; real ones do not, and tests must notice.
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 and name.endswith(("weight", "bias")):
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return made.eval()


def _clip(model: str, config: str, kind: str) -> nn.Module:
    text = CLIP_TEXT | ({"projection_size": HIDDEN} if kind == "Siglip" else {})
    extra = {} if kind == "Siglip" else {"projection_dim": 24}
    return _make(model, config, text_config=text, vision_config=IMAGE_SHAPE, **extra)


def _llava() -> nn.Module:
    return _make(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        text_config=tf.LlamaConfig(**LLAMA),
        vision_config=tf.CLIPVisionConfig(**IMAGE_SHAPE),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


def _idefics3(model: str, config: str) -> nn.Module:
    return _make(
        model,
        config,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        text_config=tf.LlamaConfig(**LLAMA),
        vision_config=IMAGE_SHAPE,
    )


_T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
}
_WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 40}
_GEMMA = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
_DISTIL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": HIDDEN,
    "hidden_dim": INNER,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
    "num_labels": 3,
    "max_position_embeddings": 40,
}
_NEOX = SHAPE | SPECIAL | {"vocab_size": VOCAB, "max_position_embeddings": 64}
_OPT = SPECIAL | {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "ffn_dim": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "dropout": 0.0,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": HIDDEN,
}
_SWIN: dict[str, Any] = STILL | {
    "image_size": PIXELS,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 2,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
    "num_labels": 3,
}
_CONVNEXT: dict[str, Any] = {
    "hidden_sizes": [16, 32],
    "depths": [1, 2],
    "num_stages": 2,
    "image_size": PIXELS,
    "patch_size": 2,
    "num_labels": 3,
    "drop_path_rate": 0.0,
    "layer_scale_init_value": 0.5,
}
_RESNET: dict[str, Any] = {
    "hidden_sizes": [16, 32],
    "depths": [1, 2],
    "embedding_size": 8,
    "num_labels": 3,
    "layer_type": "basic",
}
_PHI3 = LLAMA | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}


def _dual() -> nn.Module:
    config = tf.VisionTextDualEncoderConfig.from_vision_text_configs(
        tf.ViTConfig(**VIT), tf.BertConfig(**BERT), projection_dim=24
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.VisionTextDualEncoderModel(config).eval()


ZOO: dict[str, Callable[[], nn.Module]] = {
    "llama": partial(_make, "LlamaForCausalLM", "LlamaConfig", **LLAMA),
    "qwen2": partial(_make, "Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
    "qwen3": partial(_make, "Qwen3ForCausalLM", "Qwen3Config", **LLAMA, head_dim=8),
    "mistral": partial(_make, "MistralForCausalLM", "MistralConfig", **LLAMA, sliding_window=None),
    "phi3": partial(_make, "Phi3ForCausalLM", "Phi3Config", **_PHI3),
    "gemma": partial(_make, "GemmaForCausalLM", "GemmaConfig", **LLAMA, head_dim=8),
    "gemma2": partial(_make, "Gemma2ForCausalLM", "Gemma2Config", **_GEMMA),
    "gemma3": partial(_make, "Gemma3ForCausalLM", "Gemma3TextConfig", **_GEMMA),
    "gpt2": partial(
        _make,
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCAB,
        n_positions=40,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=INNER,
        **QUIET,
        **SPECIAL,
    ),
    "gpt_neox": partial(_make, "GPTNeoXForCausalLM", "GPTNeoXConfig", **_NEOX),
    "opt": partial(_make, "OPTForCausalLM", "OPTConfig", **_OPT),
    "mixtral": partial(_make, "MixtralForCausalLM", "MixtralConfig", **LLAMA, num_local_experts=4, **_MOE),
    "qwen3_moe": partial(
        _make,
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **LLAMA,
        head_dim=8,
        num_experts=4,
        moe_intermediate_size=24,
        **_MOE,
    ),
    "bert": partial(_make, "BertModel", "BertConfig", **BERT),
    "bert_cls": partial(_make, "BertForSequenceClassification", "BertConfig", **BERT),
    "roberta": partial(_make, "RobertaForSequenceClassification", "RobertaConfig", **BERT),
    "distilbert": partial(_make, "DistilBertForSequenceClassification", "DistilBertConfig", **_DISTIL),
    "t5": partial(_make, "T5ForConditionalGeneration", "T5Config", **_T5),
    "bart": partial(_make, "BartForConditionalGeneration", "BartConfig", **BART),
    "vit": partial(_make, "ViTForImageClassification", "ViTConfig", **VIT),
    "dinov2": partial(
        _make,
        "Dinov2ForImageClassification",
        "Dinov2Config",
        **VIT,
        mlp_ratio=2,
        layerscale_value=0.5,
    ),
    "deit": partial(_make, "DeiTForImageClassification", "DeiTConfig", **VIT),
    "swin": partial(_make, "SwinForImageClassification", "SwinConfig", **_SWIN),
    "convnext": partial(_make, "ConvNextForImageClassification", "ConvNextConfig", **_CONVNEXT),
    "resnet": partial(_make, "ResNetForImageClassification", "ResNetConfig", **_RESNET),
    "clip": partial(_clip, "CLIPModel", "CLIPConfig", "CLIP"),
    "siglip": partial(_clip, "SiglipModel", "SiglipConfig", "Siglip"),
    "dual": _dual,
    "whisper": partial(_make, "WhisperForConditionalGeneration", "WhisperConfig", **_WHISPER),
    "llava": _llava,
    "idefics3": partial(_idefics3, "Idefics3ForConditionalGeneration", "Idefics3Config"),
    "smolvlm": partial(_idefics3, "SmolVLMForConditionalGeneration", "SmolVLMConfig"),
}
CORE = {
    "decoder": "llama",
    "encoder": "bert_cls",
    "encoder_decoder": "t5",
    "vit": "vit",
    "clip": "clip",
}
DECODERS = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "opt",
    "mixtral",
    "qwen3_moe",
)
CLASSIFIERS = ("bert_cls", "roberta", "distilbert")
IMAGES = ("vit", "dinov2", "deit", "swin", "convnext", "resnet")
DUAL = ("clip", "siglip", "dual")
VLM = ("llava", "idefics3", "smolvlm")


def build(name: str) -> nn.Module:
    """Return a fresh tiny model of family `name`, the same weights each time, in eval mode."""
    return ZOO[name]()


def _text(n: int, draw: torch.Generator, length: int = LENGTH) -> dict[str, Tensor]:
    """Token ids without special tokens; row i has i padded places at the right, the last none."""
    ids = torch.randint(8, VOCAB, (n, length), generator=draw)
    mask = torch.ones(n, length, dtype=torch.long)
    for row in range(n - 1):
        keep = max(2, length - 1 - row)
        mask[row, keep:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def _pixels(n: int, draw: torch.Generator) -> Tensor:
    return torch.randn(n, 3, PIXELS, PIXELS, generator=draw)


def batch(name: str, n: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Return `n` rows of inputs for `build(name)(**batch)`: labels too where the model has a loss.

    Text rows are padded on the right (all but the last row); labels are -100 there.
    """
    draw = torch.Generator().manual_seed(seed)
    if name in IMAGES:
        return {"pixel_values": _pixels(n, draw), "labels": torch.arange(n) % 3}
    if name in DUAL:
        text = _text(n, draw)
        # CLIP pools at the first end-of-text token, which stands last before the padding.
        last = text["attention_mask"].sum(1) - 1
        text["input_ids"][torch.arange(n), last] = EOS
        return text | {"pixel_values": _pixels(n, draw), "return_loss": torch.tensor(True)}
    if name == "whisper":
        frames = torch.randn(n, 8, 20, generator=draw)
        return {"input_features": frames, "labels": _labels(_text(n, draw))}
    text = _text(n, draw)
    if name in CLASSIFIERS:
        return text | {"labels": torch.arange(n) % 3}
    if name in ("t5", "bart"):
        return text | {"labels": _labels(_text(n, draw, 5))}
    if name in VLM:
        return _with_image(name, text, _pixels(n, draw))
    return text if name == "bert" else text | {"labels": _labels(text)}


def _with_image(name: str, text: dict[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """Put the image's tokens in front: 4 patches for LLaVA, 4 / scale_factor^2 for Idefics."""
    n = len(pixels)
    front = torch.full((n, 4 if name == "llava" else 1), IMAGE)
    joined = {
        "input_ids": torch.cat([front, text["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(front), text["attention_mask"]], 1),
    }
    labels = _labels(joined).masked_fill(joined["input_ids"] == IMAGE, -100)
    images = pixels if name == "llava" else pixels[:, None]
    return joined | {"pixel_values": images, "labels": labels}


def _labels(text: dict[str, Tensor]) -> Tensor:
    return text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)


def output(name: str, out: Any) -> Tensor:
    """Return the main tensor of a model output: logits, hidden states, or image-text logits."""
    if name in DUAL:
        main: Tensor = out.logits_per_image
    else:
        main = out.last_hidden_state if name == "bert" else out.logits
    return main


def loss(name: str, out: Any) -> Tensor:
    """Return the output's own loss, or the mean square of the hidden states where it has none."""
    found: Tensor | None = out.loss if name != "bert" else None
    return out.last_hidden_state.square().mean() if found is None else found
