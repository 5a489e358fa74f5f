"""Attention memories: K and V slots that enter one attention call through transformers' attention interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftree.deltas.place import read
from peftree.deltas.verbs import Attend
from peftree.errors import MethodError
from peftree.sites import Site

if TYPE_CHECKING:
    from peftree.graft.hub import Hub
    from peftree.graft.program import Program

NAME = "peftree"


class ConfigView:
    """The module's own config, except that it names our attention function; every other attribute is live."""

    _attn_implementation = NAME

    def __init__(self, config: Any) -> None:
        self.inner = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class AttentionPart:
    """The outer part of an attention module: remembers its input and sends the call to `attend`."""

    def __init__(
        self,
        site: Site,
        module: nn.Module,
        key: tuple[nn.Module, Site],
        value: tuple[nn.Module, Site],
    ) -> None:
        if not _uses_interface(module):
            raise MethodError(
                f"The attention module {site.path} ({type(module).__name__}) does not call transformers' attention "
                "interface, so no memory can enter it.",
                "Use prompt_tuning or lora instead, or a model class that uses the interface.",
            )
        self.site = site
        self.key = key
        self.value = value
        self.config: Any = module.__dict__["config"]
        self.hidden: Tensor | None = None

    def __call__(self, hub: Hub, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int) -> Any:
        before, self.hidden = self.hidden, args[0] if args else kwargs["hidden_states"]
        try:
            return hub.run(module, args, kwargs, at)
        finally:
            self.hidden = before

    def install(self, module: nn.Module) -> None:
        """Point the module's config at our function."""
        module.__dict__["config"] = ConfigView(self.config)

    def remove(self, module: nn.Module) -> None:
        """Give the module its own config object back."""
        module.__dict__["config"] = self.config

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Map hidden vectors `[length, d]` to K and V `[length, kv_heads, head_dim]` by the frozen projections."""
        out = []
        for module, site in (self.key, self.value):
            W, b = read(module, site)
            made = functional.linear(hidden.to(W.dtype), W, b)
            out.append(made.view(*made.shape[:-1], self.site.kv_heads, self.site.head_dim))
        return out[0], out[1]

    def inner(self, module: nn.Module, hub: Hub) -> Callable[..., Any]:
        """Return the attention function that the base model is set to use."""
        eager: Any = sys.modules[hub.original.__module__].__dict__.get("eager_attention_forward")
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        return found


def _uses_interface(module: nn.Module) -> bool:
    names = type(module).forward.__code__.co_names
    wrapped = getattr(type(module).forward, "__wrapped__", None)
    more = wrapped.__code__.co_names if wrapped is not None else ()
    return "ALL_ATTENTION_FUNCTIONS" in (*names, *more) and "config" in module.__dict__


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
    route = hub.shared.route
    hidden = part.hidden
    assert hidden is not None
    if route is None:
        program = hub.program(hub.shared.active)
        return _call(module, part, program, inner, hidden, query, key, value, attention_mask, kwargs)
    out: Tensor | None = None
    for group in route.groups:
        rows = route.expand(group, query.shape[0])
        named = {k: _some(v, query.shape[0], rows) for k, v in kwargs.items()}
        mask = _some(attention_mask, query.shape[0], rows)
        program = hub.program(group.names)
        made, _ = _call(
            module,
            part,
            program,
            inner,
            hidden[rows],
            query[rows],
            key[rows],
            value[rows],
            mask,
            named,
        )
        if out is None:
            out = made.new_empty(query.shape[0], *made.shape[1:])
        out = out.index_copy(0, rows, made)
    assert out is not None
    return out, None


def _some(value: Any, n: int, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == n > 1 else value


def _call(
    module: Any,
    part: AttentionPart,
    program: Program,
    inner: Callable[..., Any],
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    extra: list[tuple[Attend, Tensor, Tensor]] = []
    for _, delta in program.attends:
        K, V = (_heads(t.to(key.dtype), key.shape[0]) for t in delta.memory(hidden, part.project))
        if delta.shared:
            mask = _widen(module, mask, K.shape[2], query, key, kwargs)
            if kwargs.get("position_bias") is not None:
                kwargs = kwargs | {"position_bias": functional.pad(kwargs["position_bias"], (K.shape[2], 0))}
            key, value = torch.cat([K, key], dim=2), torch.cat([V, value], dim=2)
        else:
            extra.append((delta, K, V))
    out, weights = inner(module, query, key, value, mask, **kwargs)
    for delta, K, V in extra:
        groups = query.shape[1] // K.shape[1]
        K, V = K.repeat_interleave(groups, dim=1), V.repeat_interleave(groups, dim=1)
        more = functional.scaled_dot_product_attention(query, K, V, scale=kwargs.get("scaling"))
        gate = delta.gate()
        more = more.transpose(1, 2)
        out = out + (more if gate is None else gate.to(more.dtype) * more)
    return out, weights


def _heads(memory: Tensor, batch: int) -> Tensor:
    """`[length, heads, dim]` or `[batch, length, heads, dim]` to `[batch, heads, length, dim]`."""
    if memory.dim() == 3:
        memory = memory.unsqueeze(0).expand(batch, -1, -1, -1)
    return memory.transpose(1, 2)


def _widen(
    module: Any,
    mask: Tensor | None,
    length: int,
    query: Tensor,
    key: Tensor,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Return the mask with `length` visible slots before the real keys."""
    if mask is None:
        q, k = query.shape[2], key.shape[2]
        causal = kwargs.get("is_causal")
        causal = module.is_causal if causal is None else causal
        if not causal or q == 1:
            return None
        return torch.ones(q, k + length, dtype=torch.bool, device=query.device).tril(k - q + length)[None, None]
    if not isinstance(mask, Tensor):
        raise MethodError(
            f"{type(module).__name__} got a {type(mask).__name__} as its mask, which takes no memory slots.",
            "Load the model with attn_implementation='sdpa' or 'eager'.",
        )
    one = mask.dtype == torch.bool or mask.dim() == 2
    return functional.pad(mask, (length, 0), value=True if one else 0.0)


AttentionInterface.register(NAME, attend)
