"""Vision-language models made of packaged parts; only what joins the towers is untrained.

The tensors that join the towers are left out of the folders: `from_pretrained` draws them, as it draws a
new classifier. `fresh_modules` in config.json names their modules, so that every method trains them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DUAL_WIDTH = 256  # of the space in which images and texts are compared
IMAGE = "<image>"
SIDE = 56  # pixels: 16 patches of 14


def dual(vision: Path, text: Path, folder: Path) -> None:
    """Write a dual encoder made of a vision and a text encoder; two projections are new."""
    from transformers import AutoModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    with _quiet():
        towers = AutoModel.from_pretrained(vision), AutoModel.from_pretrained(text)
        configs = (tower.config for tower in towers)
        config = VisionTextDualEncoderConfig.from_vision_text_configs(*configs, projection_dim=DUAL_WIDTH)
        model = VisionTextDualEncoderModel(config, *towers)
        _write(model, folder, ("text_projection", "visual_projection"))
    _tokenizer(text).save_pretrained(folder)
    _image_settings(vision, folder)


def llava(vision: Path, text: Path, folder: Path, kept: Sequence[int] = ()) -> None:
    """Write a LLaVA made of a vision encoder and a decoder, or its `kept` layers; the projector is new.

    A token `<image>` joins the vocabulary; its own embedding is never read.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    with _quiet():
        tokens = _tokenizer(text)
        tokens.add_special_tokens({"additional_special_tokens": [IMAGE]})
        tower = AutoModel.from_pretrained(vision)
        decoder = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
        if kept:
            decoder.model.layers = torch.nn.ModuleList([decoder.model.layers[index] for index in kept])
            decoder.config.num_hidden_layers = len(kept)
        known = decoder.config.vocab_size
        rows = decoder.resize_token_embeddings(max(len(tokens), known), mean_resizing=False).weight
        torch.nn.init.zeros_(rows[known:])
        config = LlavaConfig(
            vision_config=tower.config, text_config=decoder.config, vision_feature_layer=-1,
            image_token_index=tokens.convert_tokens_to_ids(IMAGE), tie_word_embeddings=True,
            image_seq_length=(SIDE // tower.config.patch_size) ** 2,
        )  # fmt: skip
        model = LlavaForConditionalGeneration(config)
        model.model.vision_tower.load_state_dict(tower.state_dict())
        model.model.language_model.load_state_dict(decoder.model.state_dict())
        _write(model, folder, ("multi_modal_projector",))
    tokens.save_pretrained(folder)
    _image_settings(vision, folder)
    reads = {
        "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": tower.config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy, "num_additional_image_tokens": 1,
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(reads, indent=2, sort_keys=True) + "\n")


def _write(model: Any, folder: Path, fresh: tuple[str, ...]) -> None:
    """Save what is pretrained, in half precision if that loses nothing, and name what is not."""
    import torch

    model.config.fresh_modules = list(fresh)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not set(fresh) & {*name.split(".")} and name != "lm_head.weight":  # tied to the embedding
            half = tensor.to(torch.float16)
            tensors[name] = half if torch.equal(half.to(tensor.dtype), tensor) else tensor
    model.save_pretrained(folder, state_dict=tensors)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("_name_or_path", None)  # the cache's place on this machine
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _image_settings(vision: Path, folder: Path) -> None:
    """Copy the tower's image settings, with a size at which a step takes about a second on one core."""
    settings = json.loads((vision / "preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' output and bars, which would break our progress line."""
    from transformers.utils import logging as hub

    level, bars = hub.get_verbosity(), hub.is_progress_bar_enabled()
    hub.set_verbosity(logging.ERROR)
    hub.disable_progress_bar()
    try:
        yield
    finally:
        hub.set_verbosity(level)
        if bars:
            hub.enable_progress_bar()
