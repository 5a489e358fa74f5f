"""Caches of past tokens to which an adapter contributed: callers count the real tokens, the stack all of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from peftree.errors import AdapterError

Made = tuple[tuple[str, int, int], ...]
"""Name, virtual tokens and shift of positions of every adapter that contributed to a cache."""


class Kept:
    """Mix-in of the class of a cache whose first tokens are virtual, or whose positions an adapter has moved.

    Attributes:
        virtual: number of virtual tokens in it.
        made: the adapters that contributed to it.
        inside: True while the stack runs, which also counts virtual tokens.
    """

    virtual: int
    made: Made
    inside: bool

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Return the number of real tokens in the cache; of all tokens while the stack runs."""
        found = super().get_seq_length(layer_idx)  # type: ignore[misc]
        return found if self.inside else found - self.virtual

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of one layer, if the adapters that contributed to the cache are on."""
        if not self.inside:
            raise AdapterError(
                f"This cache was filled with {_names(self.made)} on, but is read without.",
                "Start with an empty cache, or switch the adapter on again.",
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()  # type: ignore[misc]
        self.virtual = 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy it as the class that it was made from."""
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _kept_class(cls: Any) -> Any:
    return type(cls.__name__, (Kept, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _rebuild(cls: Any) -> Any:
    made = _kept_class(cls)
    return made.__new__(made)


def own(cache: Any) -> Any:
    """Return the cache of the stack's own attention."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def seen(cache: Any) -> int:
    """Return the number of real tokens in a cache; 0 without one."""
    return int(own(cache).get_seq_length()) if cache is not None else 0


def starts(cache: Any, made: Made) -> bool:
    """Return True if a pass with `cache` is the first one, in which virtual tokens enter.

    Args:
        cache: what the stack was called with.
        made: the adapters that take part in this pass.

    Raises:
        AdapterError: the cache was filled with other adapters, or without adapters.
    """
    inner, real = own(cache), seen(cache)
    total = real + inner.virtual if isinstance(inner, Kept) else real
    if not total:
        return True
    if not isinstance(inner, Kept):
        raise AdapterError(
            f"The cache holds {total} tokens that were read without {_names(made)}.",
            "Switch the adapter on before the first token, and start with an empty cache.",
        )
    if inner.made != made:
        raise AdapterError(
            f"This cache was filled with {_names(inner.made)} on; now it is {_names(made)}.",
            "Start with an empty cache.",
        )
    if real < 0:
        raise AdapterError(
            f"The cache was cut back to {total} tokens, but {inner.virtual} virtual ones come before the text.",
            "Crop at most as many tokens as the text has, or start with an empty cache.",
        )
    return False


@contextlib.contextmanager
def inside(cache: Any, made: Made, virtual: int) -> Iterator[None]:
    """Run the stack with `cache`, which is marked as theirs; None if it makes its own."""
    inner = own(cache)
    if inner is None:
        yield
        return
    mark(inner, made, virtual)
    inner.inside = True
    try:
        yield
    finally:
        inner.inside = False


def mark(inner: Any, made: Made, virtual: int) -> None:
    """Mark a cache as one that the adapters of `made` contributed to."""
    if not isinstance(inner, Kept):
        cls: Any = type(inner)
        inner.__class__ = _kept_class(cls)
        inner.inside = False
    inner.virtual, inner.made = virtual, made


def mark_new(out: Any, made: Made, virtual: int) -> None:
    """Mark the cache in a stack's output, which the stack made itself."""
    if torch.compiler.is_compiling():
        return  # a class cannot change within a compiled graph; such a cache is refused when it comes back
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else ()
    for value in values:
        if isinstance(value, Cache):
            mark(own(value), made, virtual)


def _names(made: Made) -> str:
    if not made:
        return "none"
    return " and ".join(f"'{n}' ({t} virtual tokens)" if t else f"'{n}'" for n, t, _ in made)
