"""Virtual tokens at the entry of a stack: trained directly, or made from trained tensors by a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from peftree.deltas.place import Place
from peftree.deltas.verbs import Prepend


class VirtualTokens(Prepend):
    """P `[l, d]` of depth 0, or `maker(P)` until `fold`.

    Args:
        P: the trained tensor.
        maker: makes the tokens `[l, d]` from P; None: P is the tokens.
    """

    def __init__(self, P: nn.Parameter, maker: nn.Module | None = None) -> None:
        super().__init__()
        self.P, self.maker = P, maker

    def tokens(self, depth: int, x: Tensor) -> Tensor:
        """Return the virtual tokens."""
        return self.made()

    def made(self) -> Tensor:
        """Return P, or what the maker makes of it."""
        made: Tensor = self.P if self.maker is None else self.maker(self.P)
        return made

    def fold(self) -> None:
        """Keep the tokens that the maker now makes, and drop the maker."""
        if self.maker is not None:
            self.P, self.maker = nn.Parameter(self.made().detach().contiguous()), None

    @property
    def length(self) -> int:
        """Number of virtual tokens."""
        return self.P.shape[0]


def start_tokens(place: Place, length: int, vocabulary: bool, ids: Sequence[int] = ()) -> nn.Parameter:
    """Return `[length, d]`: the embeddings of `ids`, of some of the first 5,000 entries, or uniform in [-0.5, 0.5].

    Raises:
        MethodError: the stack has no token with such an id.
    """
    width, table = place.site.entry or place.site.in_features, place.embedding
    if ids and (table is None or max(ids) >= table.num_embeddings):
        known = "unknown" if table is None else f"0 to {table.num_embeddings - 1}"
        raise place.refuse(f"has no token {max(ids)}: its ids are {known}", "Take ids from the model's own tokenizer.")
    P = nn.Parameter(place.empty(length, width).detach().uniform_(-0.5, 0.5))
    if (ids or vocabulary) and table is not None and not place.abstract:
        rows = torch.tensor(ids) if ids else torch.randint(0, min(5000, table.num_embeddings), (length,))
        with torch.no_grad():
            P.data = table(rows.to(place.device)).to(P)
    return P
