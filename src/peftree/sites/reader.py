"""Reads one stack: its own site, what lies around its layers, and every place in a layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peftree.sites.parts import Heads, Modules, cut, expand, experts_at, join, site_at
from peftree.sites.records import Attention, Place
from peftree.sites.site import Site
from peftree.sites.stacks import Stack


class StackReader:
    """Reads the sites of one stack."""

    def __init__(self, modules: Modules, stack: Stack) -> None:
        self.modules, self.stack, self.layout = modules, stack, stack.layout

    def sites(self) -> list[Site]:
        """Return the stack's own site, those around its layers, and those of every layer."""
        rows = [self._layer(n) for n in range(len(self.stack.layers))]
        own = [site for row in rows for site in row]
        layers = [site for site in own if site.role == "layer"]
        attn = next((s for s in own if s.kind == "attention" and not s.cross), None)
        path, layout = self.stack.path, self.layout
        embed = expand(self.modules, path, layout.embed) if layout.embed else []
        top = Site(
            "stack", self.stack.tower, None, path, "stack", layers[0].in_features,
            layers[-1].out_features, layers=self.stack.layers, embed=embed[0] if embed else None,
            heads=attn.heads if attn else 0, kv_heads=attn.kv_heads if attn else 0,
            head_dim=attn.head_dim if attn else 0, causal=self.stack.flag(layout.causal),
        )  # fmt: skip
        return [top, *self._outside(), *own]

    def _outside(self) -> Iterable[Site]:
        for role, patterns in self.layout.outside.items():
            for pattern in patterns:
                for path in expand(self.modules, self.stack.path, pattern):
                    if site := self._whole(path, role, None):
                        yield site

    def _whole(self, path: str, role: str, layer: int | None) -> Site | None:
        offset = self.layout.unit_offset
        return site_at(self.modules, path, role, self.stack.tower, layer, offset)

    def _layer(self, index: int) -> list[Site]:
        base, layout = self.stack.layers[index], self.layout
        weights = [
            site
            for role, places in layout.roles.items()
            for place in places
            for path in expand(self.modules, base, place.path)
            if (site := self._weight(index, role, place, path))
        ]
        attention = [
            site
            for role, part in (("attn", layout.attn), ("xattn", layout.xattn))
            if part and (site := self._attention(index, role, part, weights))
        ]
        norms = [
            site
            for pattern in layout.norms
            for path in expand(self.modules, base, pattern)
            if (site := self._whole(path, "norm", index))
        ]
        hull, ffn = self._hull(index, weights), self._ffn(index, weights)
        return [hull, *attention, *ffn, *weights, *norms]

    def _weight(self, index: int, role: str, place: Place, path: str) -> Site | None:
        part = self.layout.xattn if role.startswith("xattn") else self.layout.attn
        if place.parameter == "weight":
            site = self._whole(path, role, index)
        else:
            tower = self.stack.tower
            site = experts_at(self.modules, path, place.parameter, role, tower, index)
        if site is None or place.slice is None:
            return site
        return cut(site, place.slice, self._heads(index, part) if part else Heads())

    def _heads(self, index: int, part: Attention) -> Heads:
        module = self.modules.get(join(self.stack.layers[index], part.module))

        def read(field: str) -> int:
            value = getattr(self.stack.config, field, None) or getattr(module, field, 0)
            value = value[self.stack.stages[index]] if isinstance(value, list | tuple) else value
            return int(value or 0)

        query = read(part.heads)
        return Heads(query, read(part.kv_heads) or query)

    def _attention(self, index: int, role: str, part: Attention, row: list[Site]) -> Site | None:
        base = self.stack.layers[index]
        path = join(base, part.module)
        own = {site.role.rpartition(".")[2]: site for site in row if site.role[:-1] == role + "."}
        fused = next((site for site in row if site.role == role + ".qkv"), None)
        if path not in self.modules or "o" not in own or not (fused or "q" in own):
            return None
        heads = self._heads(index, part)
        if not heads.query:
            return None
        q, k, v = (own.get(name, fused) for name in "qkv")
        if q is None or k is None or v is None:
            return None
        # Widths are read from the weights: configs name the head size in many ways.
        size = heads.query + 2 * heads.keys if fused else heads.query
        head_dim = q.out_features // size
        keys = heads.keys if fused else k.out_features // head_dim
        cross = role == "xattn"
        return Site(
            role, self.stack.tower, index, path, "attention", q.in_features,
            own["o"].out_features, source=join(base, part.source or part.module),
            residual=join(base, part.residual) if part.residual else None, heads=heads.query,
            kv_heads=keys, head_dim=head_dim, project=(q.path, k.path, v.path, own["o"].path),
            causal=self.stack.flag(self.layout.causal) and not cross, cross=cross,
        )  # fmt: skip

    def _ffn(self, index: int, row: list[Site]) -> list[Site]:
        part, base = self.layout.ffn, self.stack.layers[index]
        up = next((site for site in row if site.role == "ffn.up"), None)
        down = next((site for site in row if site.role == "ffn.down"), None)
        if part is None or up is None or down is None:
            return []
        source, out = join(base, part.source), join(base, part.out)
        residual = join(base, part.residual) if part.residual else None
        return [
            Site(
                "ffn", self.stack.tower, index, out, "branch", up.in_features, down.out_features,
                source=source, residual=residual,
            )
        ]  # fmt: skip

    def _hull(self, index: int, row: list[Site]) -> Site:
        """Return the layer's own site; its width is that of the last weight on its way."""
        last: dict[str, Site] = {site.role: site for site in row if "shortcut" not in site.path}
        end = last.get("ffn.down") or last.get("attn.o") or last["conv"]
        out = wide = end.out_features
        if end.kind == "conv2d":
            first = next(site for site in row if "shortcut" not in site.path)
            module = self.modules[first.path]
            wide = module.in_channels if isinstance(module, nn.Conv2d) else wide
        path = self.stack.layers[index]
        return Site("layer", self.stack.tower, index, path, "layer", wide, out)
