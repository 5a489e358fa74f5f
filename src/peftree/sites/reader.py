"""Reads one stack: its own site, what is around its layers, and every place in a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from peftree.sites.parts import Heads, Modules, cut, expand, experts_at, field, inside, join, site_at
from peftree.sites.places import Site
from peftree.sites.records import Attention, Place
from peftree.sites.stacks import Stack

ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


class StackReader:
    """Reads the sites of one stack."""

    def __init__(self, modules: Modules, stack: Stack) -> None:
        self.modules, self.stack, self.layout = modules, stack, stack.layout

    def sites(self) -> list[Site]:
        """Return the stack's own site, those around its layers, and those of every layer."""
        rows = [self._layer(n) for n in range(len(self.stack.layers))]
        own = [site for row in rows for site in row]
        if self.layout.length_first:
            return [replace(site, length_first=True) for site in (*self._outside(), *own)]
        layers = [site for site in own if site.role == "layer"]
        attn = next((s for s in own if s.kind == "attention" and not s.cross), None)
        path, layout = self.stack.path, self.layout
        embed = expand(self.modules, path, layout.embed) if layout.embed else []
        table = self.modules[embed[0]] if embed else None
        entry = table.embedding_dim if isinstance(table, nn.Embedding) else 0
        top = Site(
            "stack", self.stack.tower, None, path, "stack", layers[0].in_features,
            layers[-1].out_features, layers=self.stack.layers, embed=embed[0] if embed else None,
            heads=attn.heads if attn else 0, kv_heads=attn.kv_heads if attn else 0,
            head_dim=attn.head_dim if attn else 0, causal=self.stack.flag(layout.causal),
            entry=entry if entry != layers[0].in_features else 0,
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
        site = self._whole(path, role, index) if place.parameter == "weight" else None
        if site is None:
            site = experts_at(self.modules, path, place.parameter, role, self.stack.tower, index, place.split)
        if site is None or place.slice is None:
            return site
        return cut(site, place.slice, self._heads(index, part) if part else Heads())

    def _heads(self, index: int, part: Attention) -> Heads:
        module = self.modules.get(join(self.stack.layers[index], part.module))

        def read(name: str) -> int:
            value = field(self.stack.config, name) or getattr(module, name, 0)
            value = value[self.stack.stages[index]] if isinstance(value, list | tuple) else value
            return int(value or 0)

        query = read(part.heads)
        return Heads(query, read(part.kv_heads) or query)

    def _attention(self, index: int, role: str, part: Attention, row: list[Site]) -> Site | None:
        base = self.stack.layers[index]
        path = join(base, part.module)
        own = {site.role.rpartition(".")[2]: site for site in row if site.role.rpartition(".")[0] == role}
        fused = own.get("qkv")
        grouped = any(site.kind == "conv" for site in own.values())  # whose widths are those of one group
        if path not in self.modules or "o" not in own or not (fused or "q" in own) or grouped:
            return None
        heads = self._heads(index, part)
        if not heads.query:
            return None
        q, k, v = (own.get(name, own.get("kv", fused) if name != "q" else fused) for name in "qkv")
        if q is None or k is None or v is None:
            return None
        near = v.path.rpartition(".")[0]  # values may be made in parts
        wide = sum(s.out_features for s in row if s.role == v.role and s.path.rpartition(".")[0] == near)
        counts, sizes = self._sizes(path, heads, q, k, replace(v, out_features=wide), own["o"])
        if not all((*counts, *sizes)):
            return None
        cross = role == "xattn"
        return Site(
            role, self.stack.tower, index, path, "attention", k.in_features if k is v else q.in_features,
            own["o"].out_features, source=join(base, part.source or part.module),
            residual=join(base, part.residual) if part.residual else None, heads=counts[0],
            kv_heads=counts[1], head_dim=sizes[0], value_dim=sizes[1] if sizes[1] != sizes[0] else 0,
            project=(q.path, k.path, v.path, own["o"].path), copies=field(self.stack.config, part.copies) or 1,
            causal=self.stack.flag(self.layout.causal) and not cross, cross=cross,
        )  # fmt: skip

    def _sizes(self, path: str, heads: Heads, q: Site, k: Site, v: Site, o: Site) -> tuple[tuple[int, int], ...]:
        """Return heads of queries and of keys, then widths of a key head and a value head.

        They are derived from the weights: configs name head sizes in many ways, and layers may differ.
        """
        fused, read, own = q.out_features, o.in_features // heads.query, self.modules[path].__dict__
        same = k.path == v.path and k.role == v.role
        if q is k:  # as many rows a head as the output projection has columns
            keys = (fused // max(1, read) - heads.query) // 2
            return (heads.query, keys), (dim := fused // (heads.query + 2 * keys), dim)
        if same and own.get("kv_lora_rank"):  # from one latent vector, expanded to every head
            count = own["num_heads"]
            return (count, count), (own.get("qk_head_dim", fused // count), o.in_features // count)
        dim, told = fused // heads.query, own.get("head_dim")
        if same and k.out_features == told:  # one head, whose keys are its values
            return (heads.query, 1), (told, told)
        if same:
            return (heads.query, k.out_features // (dim + read)), (dim, read)
        if isinstance(told, int) and told and not k.out_features % told and not fused % told:
            dim = told
        elif not (o.in_features % heads.query or k.out_features % read):
            dim = read  # a query map may hold a gate as well; what the output projection reads does not
        keys = k.out_features // dim
        value = v.out_features // max(1, keys)
        return (o.in_features // max(1, value), keys), (dim, value)

    def _ffn(self, index: int, row: list[Site]) -> list[Site]:
        part, base = self.layout.ffn, self.stack.layers[index]
        up = next((site for site in row if site.role == "ffn.up"), None)
        down = next((site for site in row if site.role == "ffn.down"), None)
        if part is None or up is None or down is None:
            return []
        source, out = join(base, part.source), join(base, part.out)
        residual = join(base, part.residual) if part.residual else None
        parts = [site for site in row if site.role.startswith("ffn.")]
        alone = [("ffn.act", path) for path in self._activations(up.path, base, [site.path for site in parts])]
        alone += [("ffn.router", path) for path in expand(self.modules, base, part.router)] if part.router else []
        parts += [Site(role, self.stack.tower, index, path, "raw", 0, 0) for role, path in alone]
        return [
            Site(
                "ffn", self.stack.tower, index, out, "branch", up.in_features, down.out_features,
                source=source, residual=residual, parts=tuple(parts),
            )
        ]  # fmt: skip

    def _activations(self, path: str, layer: str, maps: list[str]) -> list[str]:
        """Return the activation functions that are modules next to the map at `path`, or next to what holds it.

        None if there are other weights besides `maps`, such as a norm (BitNet) or a convolution (SegFormer) between.
        """
        found: list[str] = []
        while inside(path, layer) and not found:
            path = path.rpartition(".")[0]
            for name, module in self.modules[path].named_children():
                here = join(path, name)
                if type(module).__module__ in ACTIVATIONS and not isinstance(module, nn.MultiheadAttention):
                    found.append(here)
                elif path == layer or here not in self.modules or any(here == m or inside(m, here) for m in maps):
                    continue  # what a graft put there is not of the base
                elif any(True for _ in module.parameters()):
                    return []
        return found

    def _hull(self, index: int, row: list[Site]) -> Site:
        """Return the layer's own site; its width is that of the last weight on its path."""
        last: dict[str, Site] = {site.role: site for site in row if "shortcut" not in site.path}
        end = last.get("ffn.down") or last.get("attn.o") or last.get("conv")
        out = wide = end.out_features if end else 0
        if end and end.kind == "conv":
            first = next(site for site in row if "shortcut" not in site.path)
            module = self.modules[first.path]
            wide = module.in_channels if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else wide
        path = self.stack.layers[index]
        maps = self.layout.attn is None and any(site.kind == "conv" for site in row)
        return Site("layer", self.stack.tower, index, path, "layer", wide, out, maps=maps)
