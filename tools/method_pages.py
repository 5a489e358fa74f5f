"""What a method's page shows beside its fields: the equation set, where it sits, its counts, and what is built alike.

All of it is made from the method's file and from models on the meta device, while the documentation is built.
"""

from __future__ import annotations

import ast
import functools
import html
import importlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

import peftree
from peftree import registry, sites
from peftree.deltas import Attend, Prepend, Reweight, Rewrite, Side
from peftree.errors import PeftreeError

GREEK = "alpha beta gamma delta epsilon lambda mu sigma tau phi theta pi omega rho".split()
SIGNS = {
    r"\bsum(?![a-z])": "&sum;",
    r"\bsqrt\b": "&radic;",
    r" \* ": " &sdot; ",
    r" \(x\) ": " &otimes; ",
    "&lt;=": "&le;",
}
VERBS = {
    Reweight: "changes the weight", Rewrite: "changes the output", Attend: "adds keys and values",
    Prepend: "lets virtual tokens in", Side: "runs beside it",
}  # fmt: skip
# The parts of a layer as they are drawn: role, label, place and width in the drawing.
BOXES = [
    ("embed", "embedding", 0, 0, 3), ("stack", "stack", 0, 3, 1), ("norm", "norm", 1, 0, 3),
    ("attn.q", "q", 2, 0, 1), ("attn.k", "k", 2, 1, 1), ("attn.v", "v", 2, 2, 1), ("layer", "layer", 2, 3, 1),
    ("attn", "attention", 3, 0, 2), ("attn.o", "o", 3, 2, 1), ("ffn", "feed-forward", 4, 0, 1),
    ("ffn.gate", "gate", 4, 1, 1), ("ffn.up", "up", 4, 2, 1), ("ffn.down", "down", 4, 3, 1), ("head", "head", 5, 0, 3),
]  # fmt: skip
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def equation(text: str) -> str:
    """Return a method's first line as HTML, its equation set: Greek letters, signs, lower and upper indices."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and text.startswith(", ", at):
            break
    else:
        at = len(text)
    found = html.escape(text[:at], quote=False)
    for name in GREEK:
        found = re.sub(rf"\b{name}\b", f"&{name};", found)
    for plain, sign in SIGNS.items():
        found = re.sub(plain, sign, found)
    found = re.sub(r"_\{([^}]*)\}|_(\w+)", lambda m: f"<sub>{m[1] or m[2]}</sub>", found)
    found = re.sub(r"\^\{([^}]*)\}|\^(-?\w+)", lambda m: f"<sup>{m[1] or m[2]}</sup>", found)
    return f'<p class="equation"><i>{found}</i></p>\n<p>{html.escape(text[at + 2 :])}</p>\n'


@functools.cache
def references() -> dict[str, nn.Module]:
    """The models that counts are given for, without values."""
    llama = tf.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return {
            "Llama 3.2 1B": tf.LlamaForCausalLM(llama),
            "BERT base": tf.BertForSequenceClassification(tf.BertConfig()),
            "ViT base": tf.ViTForImageClassification(tf.ViTConfig()),
        }


def counts(name: str) -> list[tuple[str, str, str, str]]:
    """Return model, trained parameters at the defaults, their share, and where; or why the method does not fit."""
    rows = []
    method = registry.make(name, {})
    for title, model in references().items():
        every = sum(p.numel() for p in model.parameters())
        try:
            found = [(part, sites.resolve(model, part.sites, part.layers)) for part in method.parts()]
            count = sum(part.count(at) for part, at in found)
            at = ", ".join(dict.fromkeys(s.role for _, some in found for s in some))
            rows.append((title, f"{count:,}", f"{count / every:.3%}", at))
        except PeftreeError as error:
            rows.append((title, "-", "-", str(error).partition(". ")[0]))
    return rows


@functools.cache
def _tiny() -> dict[str, nn.Module]:
    with torch.device("meta"):
        vit = tf.ViTConfig(image_size=16, patch_size=8, **SMALL)
        llama = tf.LlamaConfig(vocab_size=64, max_position_embeddings=64, **SMALL)
        t5 = tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        return {
            "llama": tf.LlamaForCausalLM(llama),
            "vit": tf.ViTForImageClassification(vit),
            "t5": tf.T5ForConditionalGeneration(t5),
            "resnet": tf.ResNetForImageClassification(
                tf.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16])
            ),
        }


def places(name: str) -> dict[str, str]:
    """Return what the method does at each role, on a small decoder, or on the first small model that it fits."""
    for key in ("llama", "vit", "t5", "resnet"):
        model = _tiny()[key]
        try:
            adapter = peftree.adapt(model, name, head=False, **registry.get(name).tags.small)
        except PeftreeError:
            continue
        try:
            return {s.role: next(v for c, v in VERBS.items() if isinstance(d, c)) for _, s, d in adapter.entries}
        finally:
            peftree.detach(model)
    return {}


def drawing(name: str) -> str:
    """Return a layer as SVG, the parts that the method adapts filled."""
    found = places(name)
    width, height, rows = 118, 30, []
    for role, label, row, column, span in BOXES:
        on = role in found
        x, y, w = 8 + column * (width + 8), 8 + row * (height + 10), span * (width + 8) - 8
        fill = "var(--md-primary-fg-color)" if on else "none"
        ink = "var(--md-primary-bg-color)" if on else "currentColor"
        title = f"<title>{role}: {found[role]}</title>" if on else ""
        box = f'<rect x="{x}" y="{y}" width="{w}" height="{height}" rx="4" fill="{fill}" stroke="currentColor"/>'
        text = f'<text x="{x + w / 2}" y="{y + 20}" text-anchor="middle" font-size="13" fill="{ink}">{label}</text>'
        rows.append(f"<g>{title}{box}{text}</g>")
    said = "; ".join(f"{role} {what}" for role, what in found.items()) or "nothing of a decoder's layer"
    size = f'viewBox="0 0 {4 * (width + 8) + 8} {6 * (height + 10) + 8}"'
    return f'<svg {size} role="img" style="max-width:34rem" aria-label="{html.escape(said)}">{"".join(rows)}</svg>\n'


@functools.cache
def blocks(name: str) -> frozenset[str]:
    """Return the building blocks that the file of a method, or of a recipe's base, takes from `deltas`."""
    cls = registry.get(name)
    file = Path(str(importlib.import_module(_code(cls).__module__).__file__))
    taken = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.ImportFrom)]
    found = [a.name for n in taken if n.module == "peftree.deltas" for a in n.names]
    return frozenset(found) - {"LINEAR", "matrix", "Delta", *(c.__name__ for c in VERBS)}


def _code(cls: type) -> type:
    return next(c for c in cls.__mro__ if c.__module__.startswith("peftree"))


def neighbours(name: str) -> tuple[list[str], list[str], list[str]]:
    """Return the methods of the same file or base, those built from the most common blocks, and the blocks."""
    cls, mine = registry.get(name), blocks(name)
    kin, near = [], []
    for other, their in registry.methods().items():
        if other == name:
            continue
        if issubclass(their, _code(cls)) or issubclass(cls, _code(their)):
            kin.append(other)
        elif mine and blocks(other) & mine and registry.get(other).tags.branch != "hybrid":
            near.append((-len(blocks(other) & mine) / len(blocks(other) | mine), other))
    return kin, [other for _, other in sorted(near)[:6]], sorted(mine)
