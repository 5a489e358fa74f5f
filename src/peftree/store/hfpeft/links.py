"""Links between the tensors of a PEFT file and those of our deltas: names, layouts, and fused projections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from peftree.errors import StoreError
from peftree.making import Entries, states

PREFIX = "base_model.model."


class InexpressibleError(StoreError):
    """This adapter has no exact form in PEFT's format."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        what = f"PEFT's format cannot hold this adapter: {reason}."
        super().__init__(what, 'Save it with format="native", as the folder adapter of a run is.')


@dataclass(frozen=True)
class Link:
    """One tensor of a PEFT file and our tensors that it stands for.

    Attributes:
        name: its name in the file.
        keys: our tensors, as `Adapter.state` names them.
        encode: maps ours to the file's; decode: maps the file's to ours, in the order of `keys`.
    """

    name: str
    keys: tuple[str, ...]
    encode: Callable[[Sequence[Tensor]], Tensor]
    decode: Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Part:
    """How one tensor of a PEFT layer is made from tensors of one of our deltas.

    Attributes:
        theirs: the end of its name, such as `lora_A.weight`.
        ours: names of our tensors in the delta; encode and decode map between them and it.
        out: the dimension of PEFT's tensor that runs over output units; None if it has none. A fused projection,
            which is several sites here, is one layer there: tensors with that dimension are cut, others are shared.
    """

    theirs: str
    ours: tuple[str, ...]
    out: int | None = None
    encode: Callable[[Sequence[Tensor]], Tensor] = lambda t: t[0]
    decode: Callable[[Tensor], Sequence[Tensor]] = lambda t: [t]


def transposed(theirs: str, ours: str, out: int | None = 0) -> Part:
    """Return a part that is our matrix transposed."""
    return Part(theirs, (ours,), out, lambda t: t[0].mT, lambda t: [t.mT])


def reshaped(theirs: str, ours: str, shape: tuple[int, ...], own: tuple[int, ...], out: int | None = None) -> Part:
    """Return a part that is our tensor of shape `own` viewed as `shape`."""
    return Part(theirs, (ours,), out, lambda t: t[0].reshape(shape), lambda t: [t.reshape(own)])


def links_of(entries: Entries, parts: Callable[[Entries], Sequence[Part]]) -> list[Link]:
    """Return the links of entries that are one layer per module in PEFT.

    Args:
        entries: keys, sites and deltas.
        parts: returns, for the entries at one module, the parts of its PEFT layer.
    """
    have = states(entries)
    found: list[Link] = []
    for path, group in groupby(entries, key=lambda entry: entry[1].path):
        members = list(group)
        tiles = _tiles(members)
        for part in parts(members):
            keys = [f"{key}/{name}" for key, _, _ in members for name in part.ours]
            if any(key in have for key in keys):
                found.append(_link(f"{PREFIX}{path}.{part.theirs}", tuple(keys), part, tiles))
    return found


def _tiles(members: Entries) -> list[int]:
    """Return the height of each slice of a fused projection, one entry for a whole module."""
    rows = [site.rows for _, site, _ in members]
    if rows == [None]:
        return [0]
    spans = [r for r in rows if r is not None]
    starts, stops = [a for a, _ in spans], [b for _, b in spans]
    if len(spans) != len(rows) or starts != [0, *stops[:-1]]:
        site = members[0][1]
        raise InexpressibleError(f"its parts of the fused projection {site.path} do not make up the whole")
    return [b - a for a, b in spans]


def _link(name: str, keys: tuple[str, ...], part: Part, tiles: list[int]) -> Link:
    if len(tiles) == 1:
        return Link(name, keys, part.encode, part.decode)
    width = len(part.ours)

    def encode(tensors: Sequence[Tensor]) -> Tensor:
        made = [part.encode(tensors[i : i + width]) for i in range(0, len(tensors), width)]
        if part.out is not None:
            return torch.cat(made, dim=part.out)
        if not made[0].is_meta and not all(torch.equal(made[0], other) for other in made[1:]):
            raise InexpressibleError(f"{name} would be shared by slices of a fused projection that differ")
        return made[0]

    def decode(tensor: Tensor) -> Sequence[Tensor]:
        cut = [tensor] * len(tiles) if part.out is None else tensor.split(tiles, dim=part.out)
        return [ours for piece in cut for ours in part.decode(piece)]

    return Link(name, keys, encode, decode)


def head_links(entries: Entries) -> list[Link]:
    """Return the links of task heads, whole modules in PEFT's `modules_to_save`."""
    return links_of(entries, lambda _: [Part("weight", ("value",)), Part("bias", ("offset",))])


def encoded(links: Iterable[Link], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the PEFT file.

    Raises:
        InexpressibleError: a tensor of the adapter has no place in it.
    """
    used: set[str] = set()
    out: dict[str, Tensor] = {}
    for link in links:
        used |= set(link.keys)
        out[link.name] = link.encode([state[key].detach() for key in link.keys])
    left = sorted(set(state) - used)
    if left:
        raise InexpressibleError(f"it has no place for {left[0]}")
    return out


def decoded(links: Iterable[Link], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors from those of a PEFT file."""
    return {
        key: tensor for link in links for key, tensor in zip(link.keys, link.decode(tensors[link.name]), strict=True)
    }
