"""P-tuning: X = [MLP(BiLSTM(E)); E(x)], virtual tokens made from trained vectors by a small network.

Liu et al. 2021, arXiv 2103.10385, section 3. E [l, d] starts N(0, 1). `lstm`: a bidirectional LSTM of two layers, h
units each way, then 2h -> 2h, ReLU, 2h -> d; `mlp` (Hugging Face PEFT's default): d -> h, ReLU, h -> h, ReLU, h -> d.
All maps start as torch's do. The tokens stand before the text; the paper spreads them over a template. After training
they alone are kept, as in prompt tuning; torch.compile takes an LSTM only then.

>>> PTuning(encoder="mlp").encoder
'mlp'
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from peftree.deltas import VirtualTokens
from peftree.methods.contract import Deltas, Field, Method, Place, Site, Tags


class PTuning(Method):
    """Virtual tokens made by a network that is dropped after training."""

    tags: ClassVar[Tags] = Tags("additive", "arXiv 2103.10385", False, False, lr=1e-3,
        lr_from="P_Tuning.ipynb of Hugging Face PEFT; authors: 1e-4", lengthens_sequence=True, inference_cost="tokens",
        small={"length": 3, "hidden": 6, "encoder": "mlp"},
    )  # fmt: skip
    sites: str = Field("stack", description="which stacks get virtual tokens")
    length: int = Field(20, ge=1, le=10000, description="number l of virtual tokens")
    encoder: Literal["lstm", "mlp"] = Field("lstm", description="the network that makes the tokens")
    hidden: int = Field(0, ge=0, le=65536, description="its width h; 0: d / 2 each way of an LSTM, d of an MLP")

    def width(self, d: int) -> int:
        """Return h on a stack of width d."""
        return self.hidden or (d // 2 if self.encoder == "lstm" else d)

    def count(self, sites: Sequence[Site]) -> int:
        def one(d: int, h: int) -> int:
            if self.encoder == "mlp":
                return (d + 1) * h + (h + 1) * h + (h + 1) * d
            return 8 * h * (d + h + 2) + 8 * h * (3 * h + 2) + (2 * h + 1) * (2 * h + d)

        return sum(self.length * d + one(d, self.width(d)) for d in (s.entry or s.in_features for s in sites))

    def build(self, place: Place) -> VirtualTokens:
        d = place.site.entry or place.site.in_features
        return VirtualTokens(place.normal(self.length, d, std=1.0), Encoder(place, d, self))

    def post_hoc(self, deltas: Deltas) -> None:
        for delta in deltas.values():
            if isinstance(delta, VirtualTokens):
                delta.fold()


class Encoder(nn.Module):
    """The LSTM, if there is one, and the MLP."""

    def __init__(self, place: Place, d: int, method: PTuning) -> None:
        super().__init__()
        lstm = method.encoder == "lstm"
        on: dict[str, Any] = {"device": place.device, "dtype": place.dtype}
        h, kind = method.width(d), {"num_layers": 2, "bidirectional": True, "batch_first": True}
        self.lstm: Any = nn.LSTM(d, h, **kind, **on) if lstm else None
        sizes = (2 * h, 2 * h, d) if lstm else (d, h, h, d)
        maps: list[nn.Module] = [nn.Linear(a, b, **on) for a, b in pairwise(sizes)]
        self.mlp = nn.Sequential(*[m for layer in maps for m in (layer, nn.ReLU())][:-1])

    def forward(self, E: Tensor) -> Tensor:
        """Return the tokens `[l, d]` for E `[l, d]`."""
        made: Tensor = self.mlp(E if self.lstm is None else self.lstm(E)[0])
        return made
