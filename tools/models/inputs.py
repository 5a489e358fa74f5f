"""Finds inputs with which a model of any kind runs: from the names its forward takes and from its own complaints."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from tools.models.named import missing, patches, supplied
from torch import Tensor, nn

Batch = dict[str, Any]
LENGTH, ROWS = 12, 2
IMAGE_TOKENS = ("image_token_id", "image_token_index", "img_context_token_id", "media_token_index", "image_tok_id")
AUDIO_TOKENS = ("audio_token_id", "audio_token_index", "speech_token_id", "audio_chunk_index")
MISMATCH = (r"features:?\s*(\d+)", r"(?:image|audio|multimodal)\D{0,40}(\d+) (?:features|embeddings)")


def batches(model: nn.Module) -> Iterator[Batch]:
    """Yield inputs to try, the fullest first: text with images or audio, then each alone."""
    takes = set(inspect.signature(type(model).forward).parameters)
    yield from composed(model, takes)
    text = _text(model, takes, ROWS)
    yield from _first(text)
    for more in itertools.chain(_pixels(model, takes, ROWS), _audio(model, takes), _others(model, takes)):
        yield more
        if text:
            yield text | more
    if "inputs_embeds" in takes:
        width = _field(model, "hidden_size", "d_model") or 64
        yield {"inputs_embeds": _real(ROWS, LENGTH, width)}
    yield {}


def runs(model: nn.Module, call: Callable[[Batch], Any], limit: int = 150) -> tuple[Batch | None, str]:
    """Return the first inputs with which `call` works, or None and the first complaint."""
    complaint = ""
    for number, batch in enumerate(batches(model)):
        if number >= limit:
            break
        for _ in range(3):
            try:
                call(batch)
            except Exception as error:
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                complaint = complaint or said
                fixed = _answered(model, batch, str(error))
                if fixed is None:
                    break
                batch = fixed
            else:
                return batch, ""
    return None, complaint


def _answered(model: nn.Module, batch: Batch, said: str) -> Batch | None:
    """Return the batch with what the model says it lacks, or with as many tokens as it says there are features."""
    if names := missing(said):
        if all(name in batch for name in names):
            return None
        return supplied(names, batch, partial(_field, model))
    if found := re.search(r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\)", said):
        return _as_long(batch, int(found[1]), int(found[2])) or _as_wide(batch, int(found[1]), int(found[2]))
    if found := re.search(r"cannot be multiplied \(\d+x(\d+) and (\d+)x", said):
        return _as_wide(batch, int(found[1]), int(found[2]))
    token = _token(model, AUDIO_TOKENS if "input_features" in batch or "input_values" in batch else IMAGE_TOKENS)
    found = next((m for p in MISMATCH if (m := re.search(p, said))), None)
    if found is None or token is None or "input_ids" not in batch:
        return None
    count = int(found[1])
    have = int((batch["input_ids"] == token).sum())
    if count == have or not 0 < count < 4096:
        return None
    ids = batch["input_ids"]
    return batch | _with_tokens(ids[ids != token][None], token, count, set(batch))


def _as_long(batch: Batch, text: int, wanted: int) -> Batch | None:
    """Return the batch with a text as long as what it is added to."""
    if "input_ids" not in batch or text != batch["input_ids"].shape[1] or not 0 < wanted < 512:
        return None
    repeated = {k: v.repeat(1, wanted // text + 1)[:, :wanted] for k, v in batch.items() if _is_text(v, text)}
    return batch | repeated


def _as_wide(batch: Batch, have: int, wanted: int) -> Batch | None:
    """Return the batch with features as wide as the first map takes."""
    mine = [k for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point() and v.shape[-1] == have]
    if len(mine) != 1 or not 0 < wanted < 4096:
        return None
    return batch | {mine[0]: _real(*batch[mine[0]].shape[:-1], wanted)}


def _is_text(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length and not value.is_floating_point()


def _with_tokens(ids: Tensor, token: int, count: int, takes: set[str]) -> Batch:
    front = torch.full((1, count), token)
    joined = torch.cat([ids[:, :1], front, ids[:, 1:]], 1)
    out: Batch = {"input_ids": joined}
    for key in ("attention_mask", "decoder_attention_mask"):
        if key in takes:
            out[key] = torch.ones_like(joined)
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in takes:
            out[key] = (joined == token).long()
    return out


def composed(model: nn.Module, takes: set[str]) -> Iterator[Batch]:
    """Yield text with images or audio in it."""
    if "input_ids" not in takes:
        return
    text = _text(model, takes, 1)
    for names, parts in ((IMAGE_TOKENS, _pixels(model, takes, 1)), (AUDIO_TOKENS, _audio(model, takes, 1))):
        token = _token(model, names)
        for more in parts:
            if token is None:
                yield text | more
                continue
            count = more.pop("tokens", 4)
            yield text | _with_tokens(text["input_ids"], token, count, takes) | more


def _text(model: nn.Module, takes: set[str], rows: int) -> Batch:
    if "input_ids" not in takes:
        return {}
    top = min(_vocabulary(model), 90)
    ids = torch.randint(min(4, top - 1), top, (rows, LENGTH), generator=_draw())
    ids[:, -1] = _field(model, "eos_token_id") or ids[:, -1]
    out: Batch = {"input_ids": ids}
    if "attention_mask" in takes:
        out["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in takes:
        out["decoder_input_ids"] = ids[:, :8].clone()
    if "bbox" in takes:
        out["bbox"] = torch.zeros(rows, LENGTH, 4, dtype=torch.long)
    if "lang_ids" in takes:
        out["lang_ids"] = torch.zeros(rows, dtype=torch.long)
    if "visual_pos" in takes:
        out["visual_feats"] = _real(rows, 4, _field(model, "visual_feat_dim") or 64)
        out["visual_pos"] = _real(rows, 4, _field(model, "visual_pos_dim") or 4)
    return out


def _pixels(model: nn.Module, takes: set[str], rows: int) -> Iterator[Batch]:
    names = [n for n in ("pixel_values", "pixel_values_videos", "pixel_values_images", "images") if n in takes]
    if "grid_thw" in takes:
        key = names[0] if names else "hidden_states"
        yield from (patches(partial(_field, model), key, times) for times in (1, 2))
    if not names:
        return
    name = names[0]
    side, patch = _side(model), _pair(_field(model, "patch_size") or 16)
    channels = _field(model, "num_channels", "in_channels", "in_chans") or 3
    frames = _field(model, "num_frames", "frames_per_clip") or 2
    sizes = {"image_sizes": torch.tensor([[side, side]] * rows), "patch_attention_mask": None}
    extra = {k: v for k, v in sizes.items() if k in takes and v is not None}
    if "image_grid_thw" in takes or "grid_thw" in takes:
        yield from _grid(model, takes, channels, patch)
    if "spatial_shapes" in takes:
        flat = _real(rows, 16, channels * patch * patch)
        yield {name: flat, "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long),
               "spatial_shapes": torch.tensor([[4, 4]] * rows)}  # fmt: skip
    if "aspect_ratio_ids" in takes:
        yield _tiled(model, side, channels)
    one = _real(rows, channels, side, side)
    yield from _placed(model, takes, name, one)
    for shaped in (one, one[:, None], _real(rows, frames, channels, side, side)):
        yield {name: shaped}
        if extra:
            yield {name: shaped} | extra
    if "pixel_position_ids" in takes or "image_position_ids" in takes:
        where_key = "pixel_position_ids" if "pixel_position_ids" in takes else "image_position_ids"
        where = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1).reshape(1, 36, 2)
        yield {name: _real(rows, 36, 3 * patch * patch), where_key: where.expand(rows, -1, -1)}
    for other in (64, 224):
        if other != side:
            yield {name: _real(rows, channels, other, other)} | extra


def _placed(model: nn.Module, takes: set[str], name: str, one: Tensor) -> Iterator[Batch]:
    """Yield images with what says where in a text they stand, and images for a decoder."""
    rows = len(one)
    if "image_attention_mask" in takes:
        yield {name: one[:, None], "image_attention_mask": torch.ones(rows, LENGTH, 1, dtype=torch.long)}
    if "image_embeds_position_mask" in takes:
        count = _field(model, "latent_query_num") or 4
        ids = torch.randint(4, min(_vocabulary(model), 90), (rows, count + 4), generator=_draw())
        where = torch.zeros_like(ids)
        where[:, 1 : 1 + count] = 1
        yield {name: one, "input_ids": ids, "attention_mask": torch.ones_like(ids), "image_embeds_position_mask": where}
    if "decoder_input_ids" in takes and "input_ids" not in takes:
        ids = torch.randint(4, min(_vocabulary(model), 90), (rows, 6), generator=_draw())
        yield {name: one, "decoder_input_ids": ids}


def _grid(model: nn.Module, takes: set[str], channels: int, patch: int) -> Iterator[Batch]:
    """Yield flat patches with their grid, as Qwen2-VL and its kin take them."""
    merge = _field(model, "spatial_merge_size", "merge_size") or 2
    time = _field(model, "temporal_patch_size") or 1
    name = "grid_thw" if "grid_thw" in takes and "image_grid_thw" not in takes else "image_grid_thw"
    grid = torch.tensor([[1, 4, 4]])
    for flat in (_real(16, channels * time * patch * patch), _real(16, channels, patch, patch)):
        yield {"pixel_values": flat, name: grid, "tokens": 16 // merge**2}


def _tiled(model: nn.Module, side: int, channels: int) -> Batch:
    tiles = _field(model, "max_num_tiles") or 4
    mask = torch.zeros(1, 1, tiles, dtype=torch.long)
    mask[..., 0] = 1
    return {
        "pixel_values": _real(1, 1, tiles, channels, side, side),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": mask,
        "cross_attention_mask": torch.ones(1, LENGTH, 1, tiles, dtype=torch.long),
    }


def _audio(model: nn.Module, takes: set[str], rows: int = ROWS) -> Iterator[Batch]:
    decoder: Batch = {}
    if "decoder_input_ids" in takes:
        top = min(_vocabulary(model), 90)
        decoder = {"decoder_input_ids": torch.randint(1, top, (rows, 6), generator=_draw())}
    if "input_features" in takes or "audio_features" in takes:
        name = "input_features" if "input_features" in takes else "audio_features"
        names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
        mels = [*list(dict.fromkeys(v for n in names if (v := _field(model, n)))), 80, 128, 160]
        frames = 2 * (_field(model, "max_source_positions", "n_window") or 32)
        for mel, count in itertools.product(mels, dict.fromkeys((frames, 64, 100, 3000))):
            for wide, long in ((mel, count), (count, mel)):
                made: Batch = {name: _real(rows, wide, long)} | decoder
                yield made
                if "is_longer" in takes:
                    yield made | {name: _real(rows, 1, count, mel)}
                masks = ["input_features_mask", "feature_attention_mask"]
                masks += [] if "input_ids" in takes else ["attention_mask"]
                yield from (made | {key: torch.ones(rows, count, dtype=torch.long)} for key in masks if key in takes)
    for name in ("input_values", "audio_values", "waveform", "input_audio"):
        if name in takes:
            for shape in (
                (rows, 4000),
                (rows, 1, 4000),
                (rows, 80, 64),
                (rows, 64, 80),
                (rows, 1024, 128),
                (rows, 16000),
            ):
                yield {name: _real(*shape)} | decoder


def _others(model: nn.Module, takes: set[str]) -> Iterator[Batch]:
    """Yield inputs of models of series, spectrograms and the like."""
    if "past_values" in takes:
        length = _field(model, "context_length") or 32
        channels = _field(model, "num_input_channels", "input_size") or 1
        lags = max(getattr(model.config, "lags_sequence", None) or [0])
        series = _real(ROWS, length + lags, channels)
        yield {"past_values": series}
        yield {"past_values": series[..., 0]}
        time = {"past_time_features": _real(ROWS, length + lags, _field(model, "num_time_features") or 0)}
        ahead = _field(model, "prediction_length") or 4
        yield {"past_values": series[..., 0], "past_observed_mask": torch.ones(ROWS, length + lags),
               "future_values": _real(ROWS, ahead),
               "future_time_features": _real(ROWS, ahead, _field(model, "num_time_features") or 0)} | time  # fmt: skip
    if "returns_to_go" in takes:
        sizes = {"states": _field(model, "state_dim"), "actions": _field(model, "act_dim"), "returns_to_go": 1}
        yield {k: _real(ROWS, 5, v) for k, v in sizes.items()} | {"timesteps": torch.arange(5).repeat(ROWS, 1)}
    if "flattened_patches" in takes:
        places = torch.arange(1, 5).repeat(ROWS, 1)[..., None].expand(-1, -1, 2)
        patch = (_field(model, "patch_size") or 16) ** 2 * 3
        for width in dict.fromkeys((_field(model, "patch_embed_hidden_size") or patch, patch)):
            yield {"flattened_patches": torch.cat([places, _real(ROWS, 4, width)], -1)}
    if "spectrogram" in takes:
        yield {"spectrogram": _real(ROWS, 64, _field(model, "model_in_dim", "num_mel_bins") or 80)}
    if "inputs" in takes:
        yield {"inputs": torch.randint(4, 90, (ROWS, LENGTH), generator=_draw())}
    if "audio_codes" in takes:
        yield {"audio_codes": torch.randint(1, 60, (ROWS, 2, LENGTH), generator=_draw())}


def _first(batch: Batch) -> Iterator[Batch]:
    if batch:
        yield batch
        if "decoder_input_ids" in batch:
            yield batch | {"decoder_input_ids": batch["input_ids"].clone()}
            yield {k: v for k, v in batch.items() if k != "decoder_input_ids"}
        if "attention_mask" in batch:
            yield {"input_ids": batch["input_ids"]}


def _configs(model: nn.Module) -> list[Any]:
    """Return the model's config and the configs inside it, nearest first."""
    found, rest = [], [getattr(model, "config", None)]
    while rest:
        config = rest.pop(0)
        if config is None:
            continue
        found.append(config)
        rest += [v for v in vars(config).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    return found


def _field(model: nn.Module, *names: str) -> int:
    """Return the first number of these names in the configs; 0 if there is none."""
    for name, config in itertools.product(names, _configs(model)):
        value = vars(config).get(name)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _token(model: nn.Module, names: tuple[str, ...]) -> int | None:
    for config, name in itertools.product(_configs(model), names):
        value = vars(config).get(name)
        if isinstance(value, int) and value >= 0:
            return value
    return None


def _vocabulary(model: nn.Module) -> int:
    words = re.compile(r"(word|token|tok|embed_tokens|wte|shared|embeddings?$)")
    sizes = [m.num_embeddings for n, m in model.named_modules() if isinstance(m, nn.Embedding) and words.search(n)]
    return max(2, min((s for s in sizes if s > 40), default=_field(model, "vocab_size") or 90))


def _side(model: nn.Module) -> int:
    return _field(model, "image_size", "input_size", "img_size") or 64


def _pair(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _real(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_draw())
