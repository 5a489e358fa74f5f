"""Site: a named place in a base model, found by role (`attn.q`, `ffn.down`, `norm`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "linear", "conv1d", "conv", "embedding", "norm", "expert", "attention", "branch", "layer",
    "stack", "raw",
]  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place where a delta can be put. Paths are dotted module paths in the resolved model.

    Attributes:
        role: `attn attn.q attn.k attn.v attn.o xattn xattn.q .. ffn ffn.up ffn.gate ffn.down
            layer norm embed conv head stack`; also `attn.qkv` (a fused projection whose heads are
            interleaved, so that no row range is only q), `embed.position`, `embed.type`,
            `linear` (a projection of a connector, or of a model of unknown structure),
            `module` (addressed only by its path) and `module.NAME` (the same for stacked experts).
        tower: `text`, `vision`, `connector`, `audio`, or `encoder` / `decoder` for the stacks of
            an encoder-decoder.
        layer: index of the layer in its stack; None outside layers (embeddings, final norm, head,
            stack).
        path: the module that owns the tensor; for a `branch` the module whose output the branch
            adds to.
        kind: what the module is. `conv1d` is transformers' transposed linear (GPT-2), `expert` a
            3-D parameter of stacked experts `[experts, out, in]` or the weight `[out, in]` of a linear map
            of a custom class, `branch` a sub-layer given by
            two modules, `stack` a backbone, `raw` any one parameter (role `all`; widths are 0).
        in_features, out_features: width of input and output of this site (of the slice, if
            fused). For a norm its weight's length, for a layer and a stack the hidden size of
            input and output (they differ only in models with stages); for an embedding in = rows
            (vocabulary), out = width; for a conv (of any number of dimensions) in = input channels
            (per group) x kernel area, out = output channels.
        rows: for a fused projection, the half-open range of output units that belong to this role.
        source: branch and attention: path of the module whose input is the sub-layer's input
            (after its norm in pre-norm models).
        residual: branch and attention: path of the module whose input is the residual stream
            before the sub-layer (the norm in pre-norm models; equal to `source` in post-norm
            models). None if unknown.
        parameter: name of the weight parameter inside the module.
        bias: name of the bias parameter or None if the module has none.
        unit_offset: norm only: the module multiplies by (1 + weight), as Gemma's do.
        heads, kv_heads, head_dim: attention and stack only.
        value_dim: attention only: width of a head's values if it differs from that of its keys; else 0.
        parts: branch only: the sites of its maps (`ffn.gate`, `ffn.up`, `ffn.down`), and, of kind `raw`, of the modules
            that are its activation function (`ffn.act`) and a mixture's router (`ffn.router`).
        copies: attention only: how often the module itself repeats its heads of keys and values, set after set.
        project: attention only: paths of the q, k, v, o projections (relative to the model).
        entry: stack only: width of its token embeddings, if a map in it turns them to `in_features` (ALBERT); else 0.
        layers: stack only: paths of its layers, in order.
        depths: stack only: the numbers of the requested layers; empty: all.
        embed: stack only: path of the module whose output enters the first layer (vision), or of
            the token embedding (text); None if there is no such module (audio).
        causal: attention and stack: True for a decoder's self-attention.
        cross: attention only: True for cross-attention.
        experts: expert only: number of stacked experts.
        entries: raw only: number of entries of the parameter; 0 if it is tied to an earlier one.
        split: expert only: the side, `in` or `out`, that the parameter holds as its last two dimensions, heads by their
            width (XLNet); the other side is its first. Else empty.
        length_first: whether the module takes `[length, rows, width]`, so that rows of a batch cannot be routed in it.
        maps: layer only: whether it takes maps, channels first, like the layers of a convolutional network.
        area, groups: conv only: kernel area, and the number of groups that its channels are in.
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
    value_dim: int = 0
    parts: tuple[Site, ...] = ()
    copies: int = 1
    project: tuple[str, str, str, str] | None = None
    entry: int = 0
    layers: tuple[str, ...] = ()
    depths: tuple[int, ...] = ()
    embed: str | None = None
    causal: bool = False
    cross: bool = False
    experts: int = 1
    entries: int = 0
    split: str = ""
    length_first: bool = False
    maps: bool = False
    area: int = 1
    groups: int = 1

    @property
    def size(self) -> int:
        """Number of entries of the weight."""
        if self.kind in ("raw", "norm"):
            return self.entries or self.in_features
        return self.experts * self.in_features * self.out_features

    @property
    def slot(self) -> tuple[int, int]:
        """Entries of the keys, and of the values, of one token in this attention."""
        return self.kv_heads * self.head_dim, self.kv_heads * (self.value_dim or self.head_dim)

    @property
    def name(self) -> str:
        """`tower:role@layer`, the form the command line prints and accepts."""
        where = "" if self.layer is None else f"@{self.layer}"
        return f"{self.tower}:{self.role}{where}"
