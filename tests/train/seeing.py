"""Tiny models that read images, with processors of their own, built without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIDE = 28
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 320, "max_position_embeddings": 512, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": SIDE,
    "patch_size": 14,
}  # fmt: skip
FAMILIES = ("llava", "idefics3", "qwen2_vl", "qwen2_5_vl", "paligemma", "gemma3")


class Stills:
    """A processor without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        """Take no part for videos."""
        return None if "video" in name else super().check_argument_for_proper_class(name, argument)  # type: ignore[misc]


def tokenizer(specials: list[str], **named: str) -> Any:
    """Return a tokenizer of bytes with special tokens, some of which have names."""
    names = ["<pad>", "<s>", "</s>", *specials]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({n: i for i, n in enumerate([*names, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(names)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512,
        extra_special_tokens=named or None,
    )  # fmt: skip


def square(kind: str, **more: Any) -> Any:
    """Return an image processor for squares of `SIDE` pixels."""
    size = {"height": SIDE, "width": SIDE}
    return getattr(tf, kind)(**({"size": size, "crop_size": size} | more))


def built(family: str) -> tuple[Any, Any]:
    """Return a fresh model of a family and its processor."""
    turns, image = ["<|im_start|>", "<|im_end|>"], "<image>"
    if family == "llava":
        words = tokenizer([*turns, image])
        processor: Any = tf.LlavaProcessor(
            square("CLIPImageProcessorPil"), words, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=CHATML.replace("IMAGE", image),
        )  # fmt: skip
        config: Any = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=32), text_config=tf.LlamaConfig(**TEXT),
            image_token_id=words.convert_tokens_to_ids(image),
        )  # fmt: skip
        return tf.LlavaForConditionalGeneration(config), processor
    if family == "idefics3":
        extra = ["<fake_token_around_image>", image, "<end_of_utterance>", "<global-img>"]
        words = tokenizer([*turns, *extra, *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))])
        look = tf.Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True
        )
        processor = tf.Idefics3Processor(look, words, image_seq_len=1, chat_template=CHATML.replace("IMAGE", image))
        config = tf.Idefics3Config(
            image_token_id=words.convert_tokens_to_ids(image), vision_config=VISION, text_config=tf.LlamaConfig(**TEXT),
            scale_factor=2, pad_token_id=0,
        )  # fmt: skip
        return tf.Idefics3ForConditionalGeneration(config), processor
    if family.startswith("qwen"):
        marks = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
        words = tokenizer([*turns, *marks])
        look = tf.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
        name = "Qwen2VL" if family == "qwen2_vl" else "Qwen2_5_VL"
        kind = type(f"{name}Processor", (Stills, getattr(tf, f"{name}Processor")), {})
        processor = kind(look, words, None, chat_template=CHATML.replace("IMAGE", "".join(marks[:3])))
        ids = dict(zip(("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id"),
                       words.convert_tokens_to_ids(marks), strict=True))  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        deep = {"depth": 2, "num_heads": 4, "hidden_size": 32, "patch_size": 14}
        deep |= {"embed_dim": 32} if name == "Qwen2VL" else {"out_hidden_size": 32, "intermediate_size": 48}
        text = {k: v for k, v in TEXT.items() if k != "head_dim"} | {"rope_parameters": rope}
        config = getattr(tf, f"{name}Config")(text_config=text, vision_config=deep, **ids)
        return getattr(tf, f"{name}ForConditionalGeneration")(config), processor
    if family == "paligemma":
        words = tokenizer([image], image_token=image)
        look = square("SiglipImageProcessorPil")
        look.image_seq_length = 4
        processor = tf.PaliGemmaProcessor(look, words)
        config = tf.PaliGemmaConfig(
            vision_config=tf.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=tf.GemmaConfig(**(TEXT | {"vocab_size": 1600})), projection_dim=32, vocab_size=1600,
            image_token_id=words.convert_tokens_to_ids(image),
        )  # fmt: skip
        return tf.PaliGemmaForConditionalGeneration(config), processor
    marks = ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]
    words = tokenizer([*turns, *marks], boi_token=marks[0], image_token=marks[1], eoi_token=marks[2])
    look = square("Gemma3ImageProcessorPil")
    processor = tf.Gemma3Processor(look, words, chat_template=CHATML.replace("IMAGE", marks[0]), image_seq_length=4)
    boi, soft, eoi = words.convert_tokens_to_ids(marks)
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**(VISION | {"image_size": 56}), vision_use_head=False),
        text_config=tf.Gemma3TextConfig(**TEXT, sliding_window=64), image_token_id=soft, boi_token_id=boi,
        eoi_token_id=eoi, mm_tokens_per_image=4,
    )  # fmt: skip
    look.size = {"height": 56, "width": 56}
    return tf.Gemma3ForConditionalGeneration(config), processor


def saved(family: str, folder: Path) -> str:
    """Save a fresh model of a family and its processor, and return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = built(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
