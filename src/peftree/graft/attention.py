"""Attention memories: K and V slots that enter one attention call through transformers' attention interface."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftree.deltas.place import read
from peftree.deltas.verbs import Attend, Delta
from peftree.errors import MethodError, PeftreeWarning
from peftree.graft.call import PerThread
from peftree.graft.program import narrowed
from peftree.sites import Site
from peftree.sites.parts import interfaced

if TYPE_CHECKING:
    from peftree.graft.hub import Hub
    from peftree.graft.program import Program

NAME = "peftree"


class ConfigView:
    """The module's own config, except that it names our attention function; all other attributes pass through."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self.inner = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class Seen(PerThread):
    """The input of the attention call in progress, `[batch, tokens, d]`."""

    hidden: Tensor | None = None


class AttentionPart:
    """The outer part of an attention module: stores its input and sends the call to `attend`."""

    def __init__(self, site: Site, module: nn.Module) -> None:
        if not interfaced(module):
            raise MethodError(
                f"The attention module {site.path} ({type(module).__name__}) does not call transformers' attention "
                "interface, so no memory can enter it.",
                "Use prompt_tuning or lora instead, or a model class that uses the interface.",
            )
        self.site = site
        self.projections: list[tuple[nn.Module, Site]] = []  # of keys and values, where a delta asks for them
        self.config: Any = module.__dict__["config"]
        self.seen = Seen()

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        before, self.seen.hidden = self.seen.hidden, next(iter((*args, *kwargs.values())))
        try:
            return hub.run(module, args, kwargs, at)
        finally:
            self.seen.hidden = before

    def install(self, module: nn.Module) -> None:
        """Point the module's config at our function."""
        module.__dict__["config"] = ConfigView(self.config)

    def remove(self, module: nn.Module) -> None:
        """Give the module its own config object back."""
        module.__dict__["config"] = self.config

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Map hidden vectors `[length, d]` to K and V `[length, kv_heads, head_dim]` by the frozen projections."""
        out = []
        for module, site in self.projections:
            frozen = read(module, site)
            W = frozen.weight
            made = functional.linear(hidden.to(W.dtype), W, frozen.bias)
            out.append(made.unflatten(-1, (self.site.kv_heads, -1)))
        return out[0], out[1]

    def inner(self, module: nn.Module, hub: Hub) -> Callable[..., Any]:
        """Return the attention function that the base model is set to use."""
        eager: Any = sys.modules[hub.original.__module__].__dict__.get("eager_attention_forward")
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        return found


def attending(model: nn.Module, entries: list[tuple[str, Site, Delta]]) -> list[tuple[str, Site, Delta]]:
    """Return entries without memories of layers that cannot take them, with a warning; all, if no layer can."""
    without = [s for _, s, d in entries if isinstance(d, Attend) and not interfaced(model.get_submodule(s.path))]
    if not 0 < len(without) < len(entries):
        return entries
    if not any(p.is_meta for p in model.parameters()):
        warnings.warn(
            f"{len(without)} of {len(entries)} sites get no memory, since their attention does not call transformers' "
            f"attention interface: {', '.join(s.name for s in without)}.",
            PeftreeWarning,
            stacklevel=4,
        )
    return [entry for entry in entries if entry[1] not in without]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the base model's attention with the active memories of this module.

    Args:
        query: `[batch, heads, q, head_dim]`; key, value: `[batch, kv_heads, k, head_dim]`.
        attention_mask: None, `[batch, k]`, or `[batch, 1 or heads, q, k]` (bool, or added to the scores).
    """
    hub: Hub = module.deltas
    part = next(p for p in hub.outer if isinstance(p, AttentionPart))
    inner = part.inner(module, hub)
    choice = hub.shared.now
    if choice.unseen is not None and any(hub.program((n,)).attends for n in choice.names):
        choice.used(hub.path)
    hidden = part.seen.hidden
    assert hidden is not None
    call = Call(hidden, query, key, value, attention_mask, kwargs)
    if (route := choice.route) is None:
        return _run(module, part, hub.program(choice.active), inner, call)
    out: Tensor | None = None
    for group in route.groups:
        rows = route.expand(group, query.shape[0])
        with narrowed(route, group):
            made, _ = _run(module, part, hub.program(group.names), inner, call.some(rows))
        if out is None:
            out = made.new_empty(query.shape[0], *made.shape[1:])
        out = out.index_copy(0, rows, made)
    assert out is not None
    return out, None


class Call(NamedTuple):
    """The arguments of one attention call (see `attend`), and the input `[batch, tokens, d]` of its module."""

    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    more: dict[str, Any]

    def some(self, rows: Tensor) -> Call:
        """Return the call with only these rows of the batch."""
        n = self.query.shape[0]

        def cut(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == n > 1 else value

        q, k, v = self.query[rows], self.key[rows], self.value[rows]
        return Call(self.hidden[rows], q, k, v, cut(self.mask), {name: cut(v) for name, v in self.more.items()})

    def with_slots(self, module: Any, K: Tensor, V: Tensor) -> Call:
        """Return the call with slots `[batch, kv_heads, length, head_dim]` before its keys and values."""
        more, bias = self.more, self.more.get("position_bias")
        if bias is not None:
            more = more | {"position_bias": functional.pad(bias, (K.shape[2], 0))}
        key, value = torch.cat([K, self.key], dim=2), torch.cat([V, self.value], dim=2)
        return self._replace(mask=_widen(module, self, K.shape[2]), key=key, value=value, more=more)


def _run(
    module: Any, part: AttentionPart, program: Program, inner: Callable[..., Any], call: Call
) -> tuple[Tensor, Tensor | None]:
    extra: list[tuple[Attend, Tensor, Tensor]] = []
    for _, delta in program.attends:
        memory = delta.memory(call.hidden, part.project)
        made = (_heads(t.to(call.key.dtype), call.key.shape[0]) for t in memory)
        K, V = (t.repeat(1, part.site.copies, 1, 1) for t in made)
        if delta.shared:
            call = call.with_slots(module, K, V)
        else:
            extra.append((delta, K, V))
    query = call.query
    out, weights = inner(module, query, call.key, call.value, call.mask, **call.more)
    for delta, K, V in extra:
        groups = query.shape[1] // K.shape[1]
        K, V = K.repeat_interleave(groups, dim=1), V.repeat_interleave(groups, dim=1)
        more = functional.scaled_dot_product_attention(query, K, V, scale=call.more.get("scaling"))
        gate = delta.gate()
        more = more.transpose(1, 2)
        out = out + (more if gate is None else gate.to(more.dtype) * more)
    return out, weights


def _heads(memory: Tensor, batch: int) -> Tensor:
    """`[length, heads, dim]` or `[batch, length, heads, dim]` to `[batch, heads, length, dim]`."""
    if memory.dim() == 3:
        memory = memory.unsqueeze(0).expand(batch, -1, -1, -1)
    return memory.transpose(1, 2)


def _widen(module: Any, call: Call, length: int) -> Tensor | None:
    """Return the mask with `length` visible slots before the real keys."""
    if (mask := call.mask) is None:
        q, k = call.query.shape[2], call.key.shape[2]
        causal = call.more.get("is_causal")
        causal = module.__dict__.get("is_causal", True) if causal is None else causal  # as transformers' sdpa has it
        if not causal or q == 1:
            return None
        return torch.ones(q, k + length, dtype=torch.bool, device=call.query.device).tril(k - q + length)[None, None]
    if not isinstance(mask, Tensor):
        raise MethodError(
            f"{type(module).__name__} got a {type(mask).__name__} as its mask, which cannot take memory slots.",
            "Load the model with attn_implementation='sdpa' or 'eager'.",
        )
    one = mask.dtype == torch.bool or mask.dim() == 2
    return functional.pad(mask, (length, 0), value=True if one else 0.0)


AttentionInterface.register(NAME, attend)
