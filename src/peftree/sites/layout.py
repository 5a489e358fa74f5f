"""The roles in the layers of a stack without a record: what each linear map is, by its name and its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftree.sites.parts import Modules, field, inside, interfaced, kind_of, width_of
from peftree.sites.vocabulary import CROSS, GATED, NAMES, PAIRS, PLAIN, THIRDS

Places = dict[str, list[Any]]


class LayerNames:
    """Reads the layers of one stack.

    Attributes:
        roles: role to places, relative to a layer.
        attention: paths of the self-attention modules, in order.
        parents: their paths relative to their layers, each once.
        feeds: where feed-forward networks start and end, relative to their layers, each once.
    """

    def __init__(self, modules: Modules, units: dict[str, str], layers: Sequence[str]) -> None:
        self.modules, self.units = modules, units
        self.roles: Places = {}
        self.attention: list[str] = []
        self.parents: list[str] = []
        self.feeds: list[tuple[str, str]] = []
        self.norms: list[str] = []
        for layer in layers:
            self._read(layer)

    def layout(self) -> dict[str, Any]:
        """Return what is known, in the form of a record."""
        feed = self.feeds[0] if len(self.feeds) == 1 and not self._experts() else None
        ends = {"in": feed[0], "out": feed[1]} if feed else None
        return {"roles": self.roles, "norms": self.norms, "ffn": ends}

    def attend(
        self, modules: Modules, config: Any, counts: Sequence[str], keys: Sequence[str]
    ) -> dict[str, Any] | None:
        """Return the attention of a layer in the form of a record; None if there is none or its heads are unknown."""
        if not self.parents or "attn.o" not in self.roles or not {"attn.qkv", "attn.v", "attn.kv"} & set(self.roles):
            return None
        # Where layers are of several kinds, those that take a memory.
        ends = dict.fromkeys((p, n) for p in self.attention for n in self.parents if p.endswith("." + n))
        able = {name: path for path, name in ends if len(self.parents) == 1 or interfaced(modules[path])}
        if len(able) != 1:
            return None
        ((name, path),) = able.items()
        own = modules[path]

        def known(names: Sequence[str]) -> str | None:
            values = ((n, field(config, n) or own.__dict__.get(n)) for n in names)
            return next((n for n, v in values if isinstance(v, int | list | tuple) and v and v is not True), None)

        heads = known(counts)
        found = {"module": name, "heads": heads, "kv_heads": known(keys) or keys[0]}
        return found if heads else None

    def _experts(self) -> bool:
        return any(isinstance(place, dict) and "parameter" in place for row in self.roles.values() for place in row)

    def _add(self, role: str, layer: str, unit: str, **more: Any) -> None:
        path = self.units.get(unit, unit).removeprefix(layer + ".")
        place = {"path": path, **more} if more else path
        if place not in self.roles.setdefault(role, []):
            self.roles[role].append(place)

    def _read(self, layer: str) -> None:
        free = {unit: path for unit, path in self.units.items() if inside(path, layer)}
        for parent in dict.fromkeys(unit.rpartition(".")[0] for unit in free):
            self._attention(layer, parent, free)
        attending = {*self.units.values()} - {*free.values()}
        free = {unit: path for unit, path in free.items() if kind_of(self.modules[path]) != "conv"}
        held = [base for base in self.attention if base != layer]  # what lies in an attention makes its biases
        for parent in dict.fromkeys(_above(unit) for unit in free):
            if not any(parent == base or inside(parent, base) for base in held):
                self._feed(layer, parent, free)
        for unit in free:
            self._add("linear", layer, unit)
        for path, module in self.modules.items():
            if not inside(path, layer):
                continue
            kind = kind_of(module)
            if kind == "norm" and (name := path.removeprefix(layer + ".")) not in self.norms:
                self.norms.append(name)
            elif kind == "conv" and path not in attending:
                self._add("conv", layer, path)
            elif "down_proj" in module._parameters:
                self._stacked(layer, path)

    def _attention(self, layer: str, parent: str, free: dict[str, str]) -> None:
        """Take the projections of the attention at `parent`, if there is one, out of `free`."""
        leaves = {unit.rpartition(".")[2]: unit for unit in free if unit.rpartition(".")[0] == parent}
        parts = {
            part: [u for leaf, u in leaves.items() if leaf in NAMES[part]] for part in ("q", "k", "v", "kv", "qkv")
        }
        only = {part: units[0] for part, units in parts.items() if len(units) == 1}
        wanted = [("q", "k", "v"), ("q", "kv"), ("qkv",)]
        found = next((names for names in wanted if all(name in only for name in names)), None)
        if found is None:
            return
        cross = any(word in parent.removeprefix(layer).lower() for word in CROSS)
        prefix = "xattn" if cross else "attn"
        used = {name: only[name] for name in found}
        if output := self._output(layer, parent, free, set(used.values())):
            used["o"] = output
        for name, unit in used.items():
            del free[unit]
            if name == "qkv" and self._thirds(unit, output):
                for index, part in enumerate("qkv"):
                    self._add(f"{prefix}.{part}", layer, unit, slice=f"{index}/3")
            else:
                self._add(f"{prefix}.{name}", layer, unit)
        if not cross:
            self.attention.append(parent)
            if (name := parent.removeprefix(layer + ".")) not in self.parents:
                self.parents.append(name)

    def _output(self, layer: str, parent: str, free: dict[str, str], used: set[str]) -> str | None:
        """Return the output projection of an attention: in its module, or in the module around it."""
        for base in (parent, parent.rpartition(".")[0]):
            if base == layer or not inside(base, layer):
                break
            near = [u for u in free if inside(u, base) and u not in used and u.rpartition(".")[2] in NAMES["o"]]
            if len(near) == 1:
                return near[0]
        return None

    def _width(self, unit: str) -> tuple[int, int]:
        module = self.modules[self.units[unit]]
        kind = kind_of(module)
        assert kind is not None
        return width_of(module, kind)

    def _thirds(self, unit: str, output: str | None) -> bool:
        """Return whether a fused projection stacks queries, keys and values of one width."""
        wide, high = self._width(unit)
        inner = self._width(output)[0] if output else wide
        whole = kind_of(self.modules[self.units[unit]]) != "conv"
        return whole and unit.rpartition(".")[2] in THIRDS and high == 3 * inner

    def _feed(self, layer: str, parent: str, free: dict[str, str]) -> None:
        """Take the maps of the feed-forward network at `parent`, if there is one, out of `free`."""
        here = {_leaf(unit): unit for unit in free if _above(unit) == parent}
        alias = GATED if GATED.keys() <= here.keys() else PLAIN if PLAIN.keys() <= here.keys() else {}
        named = {alias.get(leaf, leaf): unit for leaf, unit in here.items()}
        only: dict[str, str] = {}
        for part in ("up", "gate", "gate_up", "down"):
            mine = [u for leaf, u in named.items() if leaf in NAMES[part] or PAIRS.get(leaf) == part]
            if len(mine) == 1:
                only[part] = mine[0]
        if "down" not in only and len(here) == 2 and self._widens(*here.values()):
            only = dict(zip(("up", "down"), here.values(), strict=True))
        if "down" not in only or not {"up", "gate_up"} & only.keys():
            return
        self._place_feed(layer, parent, only, free)

    def _widens(self, first: str, second: str) -> bool:
        (a, b), (c, d) = self._width(first), self._width(second)
        return a == d and b == c and b > a

    def _place_feed(self, layer: str, parent: str, only: dict[str, str], free: dict[str, str]) -> None:
        inner = self._width(only["down"])[0]
        up = only.get("up") or only["gate_up"]
        high = self._width(up)[1]
        if "gate_up" in only and high == 2 * inner:
            for index, part in enumerate(("gate", "up")):
                self._add(f"ffn.{part}", layer, up, slice=f"{index}/2")
            del free[up]
        elif high == inner:
            for part in ("gate", "up"):
                if part in only:
                    self._add(f"ffn.{part}", layer, only[part])
                    del free[only[part]]
        else:  # a gate and what it gates in one map, in an order that the name does not tell
            self._add("linear", layer, up)
            del free[up]
        self._add("ffn.down", layer, only["down"])
        del free[only["down"]]
        name = parent.removeprefix(layer).lstrip(".")
        ends = [u.removeprefix(layer + ".") for u in (up, only["down"])]
        if ends[0].endswith("intermediate.dense"):
            ends[0] = ends[0].removesuffix(".dense")
        whole = name and ends[0].rpartition(".")[0] == ends[1].rpartition(".")[0] == name
        feed = (name, name) if whole and parent not in self.attention else (ends[0], ends[1])
        if feed not in self.feeds:
            self.feeds.append(feed)

    def _stacked(self, layer: str, path: str) -> None:
        """Add stacked experts whose matrices are `[out, in]`, gate before up."""
        module = self.modules[path]
        down, both = module._parameters.get("down_proj"), module._parameters.get("gate_up_proj")
        if down is None or down.ndim != 3 or module.__dict__.get("is_transposed", False):
            return
        halves = both is not None and both.ndim == 3 and module.__dict__.get("is_concatenated", True)
        if halves and both is not None and both.shape[1:] == (2 * down.shape[2], down.shape[1]):
            for index, part in enumerate(("gate", "up")):
                self._add(f"ffn.{part}", layer, path, parameter="gate_up_proj", slice=f"{index}/2")
            self._add("ffn.down", layer, path, parameter="down_proj")


def _leaf(unit: str) -> str:
    """Return the name by which a map is known: its last component, or its last two if the last says nothing."""
    pair = ".".join(unit.split(".")[-2:])
    return pair if pair in PAIRS else unit.rpartition(".")[2]


def _above(unit: str) -> str:
    """Return the module in which a map is known by that name."""
    parent = unit.rpartition(".")[0]
    return parent.rpartition(".")[0] if _leaf(unit) in PAIRS else parent
