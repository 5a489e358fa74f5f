"""Site: a named place in a base model, found by role (`attn.q`, `ffn.down`, `norm`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "linear", "conv1d", "conv2d", "embedding", "norm", "expert", "attention", "branch", "layer",
    "stack", "raw",
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place where a delta can be put. Paths are dotted module paths in the resolved model.

    Attributes:
        role: `attn attn.q attn.k attn.v attn.o xattn xattn.q .. ffn ffn.up ffn.gate ffn.down
            layer norm embed conv head stack`; also `attn.qkv` (a fused projection whose heads are
            interleaved, so that no row range is q alone), `embed.position`, `embed.type`,
            `linear` (a projection of a connector) and `module` (addressed by its path alone).
        tower: `text`, `vision`, `connector`, `audio`, or `encoder` / `decoder` for the stacks of
            an encoder-decoder.
        layer: index of the layer in its stack; None outside layers (embeddings, final norm, head,
            stack).
        path: the module that owns the tensor; for a `branch` the module whose output the branch
            adds to.
        kind: what the module is. `conv1d` is transformers' transposed linear (GPT-2), `expert` a
            3-D parameter of stacked experts `[experts, out, in]`, `branch` a sub-layer given by
            two modules, `stack` a backbone, `raw` any one parameter (role `all`; widths are 0).
        in_features, out_features: width of input and output of this site (of the slice, if
            fused). For a norm its weight's length, for a layer and a stack the hidden size of
            input and output (they differ only in models with stages); for an embedding in = rows
            (vocabulary), out = width; for a conv2d in = input channels (per group) x kernel area,
            out = output channels.
        rows: for a fused projection, the half-open range of output units that belong to this role.
        source: branch and attention: path of the module whose input is the sub-layer's input
            (after its norm in pre-norm models).
        residual: branch and attention: path of the module whose input is the residual stream
            before the sub-layer (the norm in pre-norm models; equal to `source` in post-norm
            models). None where it is not known.
        parameter: name of the weight parameter inside the module.
        bias: name of the bias parameter or None if the module has none.
        unit_offset: norm only: the module multiplies by (1 + weight), as Gemma's do.
        heads, kv_heads, head_dim: attention and stack only.
        project: attention only: paths of the q, k, v, o projections (relative to the model).
        layers: stack only: paths of its layers, in order.
        embed: stack only: path of the module whose output enters the first layer (vision), or of
            the token embedding (text); None where there is no such module (audio).
        causal: attention and stack: True for a decoder's self-attention.
        cross: attention only: True for cross-attention.
    """

    role: str
    tower: str
    layer: int | None
    path: str
    kind: Kind
    in_features: int
    out_features: int
    rows: tuple[int, int] | None = None
    source: str | None = None
    residual: str | None = None
    parameter: str = "weight"
    bias: str | None = None
    unit_offset: bool = False
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    project: tuple[str, str, str, str] | None = None
    layers: tuple[str, ...] = ()
    embed: str | None = None
    causal: bool = False
    cross: bool = False

    @property
    def name(self) -> str:
        """`tower:role@layer`, the form the command line prints and accepts."""
        where = "" if self.layer is None else f"@{self.layer}"
        return f"{self.tower}:{self.role}{where}"
