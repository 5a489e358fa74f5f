"""Logits that a model's head does not compute until something reads them; a cross-entropy reads them in chunks.

While `deferred` is on, the head returns `Logits`: a tensor without data that knows the hidden states, the head, and
what the model's code does to it (casts, scales, soft caps, views, shifts). `cross_entropy` of it is `token_losses` of
the labelled places. Whatever else reads it gets the whole logits, computed then, as without this file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree

from peftree.deltas.packed import is_packed
from peftree.errors import AdapterError
from peftree.graft.swap import Adapted
from peftree.loss.chunked import OFF, Head, Step, rows, spans, token_losses

_GET = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "is_sparse", "is_nested", "is_quantized")
_CALL = ("size", "dim", "ndimension", "numel", "element_size", "is_floating_point", "is_complex", "__len__")
_LOOKS = {getattr(Tensor, n).__get__ for n in _GET} | {getattr(Tensor, n) for n in _CALL}
_INTO = {f"__i{n}__" for n in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
_HEARS = {Tensor.register_hook, Tensor.retain_grad}
_IGNORED = -100


@dataclass
class Waiting:
    """What is known of the logits of one `deferred` block.

    Attributes:
        count: the number of labelled places, if they cannot be counted (in a plan).
        skipped: floating-point operations of chunks that a plan leaves out, since others hold the same.
        reads: how often logits were computed because something but a loss read them, whole or some places of them.
    """

    count: int | None = None
    skipped: int = 0
    reads: int = 0


class Logits(Tensor):
    """Logits without data.

    Attributes:
        hidden: `[..., width]`, what the head got.
        head: its weights, and what was done to the logits since.
        graph: whether the graph was recorded when the head ran.
        waiting: the block in which it ran.
        viewed: whether this is a view of other logits, or others are a view of this.
        used: whether something was made of this without computing it.
        age: how often the hidden states and the weight had been changed in place.
    """

    hidden: Tensor
    head: Head
    graph: bool
    waiting: Waiting
    viewed: bool
    used: bool
    age: list[int]
    _whole: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        me = args[0] if args and isinstance(args[0], Logits) else None
        if me is not None and me._whole is None and func in _KNOWN:
            me._still()
            found = _KNOWN[func](me, *args[1:], **kwargs)
            if found is not None:
                me.used |= found is not me
                return found
        if me is not None and me.used and func in _HEARS:
            raise AdapterError("The loss was computed without these logits, so they get no gradient.", OFF)
        changed = _changed(func, args, kwargs)
        if changed is not None and changed.viewed:
            raise AdapterError(
                "The model's code changes a view of its logits in place, which a loss without logits cannot follow.",
                OFF,
            )
        args, kwargs = _pytree.tree_map_only(cls, lambda logits: logits.whole(), (args, kwargs))
        return func(*args, **kwargs)

    __torch_dispatch__: Any = __torch_function__  # for kernels in C++ that do not ask Python

    def whole(self) -> Tensor:
        """Return the logits, computed the first time with the graph that the head's run would have had."""
        if self._whole is None:
            self._still()
            self.waiting.reads += 1
            head = self.head.cast()
            with torch.autocast(self.hidden.device.type, enabled=False), torch.set_grad_enabled(self.graph):
                z = functional.linear(self.hidden.to(head.dtype), head.weight, head.bias)
                for step in head.steps:
                    z = _apart(step, z)
            self._whole = z
        return self._whole

    def _still(self) -> None:
        if self.age != _age(self.hidden, self.head):
            raise AdapterError("What the logits are computed from was changed in place after the head ran.", OFF)

    def _like(self, hidden: Tensor, head: Head, viewed: bool) -> Logits:
        self.viewed |= viewed
        return _made(hidden, head, self.graph, self.waiting, viewed)


def _made(hidden: Tensor, head: Head, graph: bool, waiting: Waiting, viewed: bool = False) -> Logits:
    shape = (*hidden.shape[:-1], len(head.weight))
    leaf = graph and hidden.requires_grad
    out: Any = Tensor._make_wrapper_subclass(Logits, shape, dtype=head.out, device=hidden.device, requires_grad=leaf)
    out.hidden, out.head, out.graph, out.waiting, out.viewed, out._whole = hidden, head, graph, waiting, viewed, None
    out.used, out.age = False, _age(hidden, head)
    if leaf:
        with torch._C.DisableTorchFunctionSubclass():
            out.register_hook(_lost)
    return out  # type: ignore[no-any-return]


def _age(hidden: Tensor, head: Head) -> list[int]:
    return [0 if t.is_inference() else t._version for t in (hidden, head.weight)]


def _lost(gradient: Tensor) -> None:
    """Refuse a gradient that reached the stand-in: code that does not ask Python took it for the logits."""
    raise AdapterError("The loss reads the logits in a way that a loss without logits cannot follow.", OFF)


def _apart(step: Step, z: Tensor) -> Tensor:
    """Do a step without changing what it gets."""
    return step(z) if step.name == "to" else getattr(torch, step.name)(z, *([] if step.value is None else [step.value]))


def _changed(func: Any, args: Any, kwargs: Any) -> Logits | None:
    """Return the logits that a function changes in place, if it changes any."""
    name = getattr(func, "__name__", "")
    into = kwargs.get("out")
    if isinstance(into, Logits):
        return into
    first = args[0] if args else None
    changes = name == "__setitem__" or name in _INTO or (name.endswith("_") and not name.endswith("__"))
    return first if changes and isinstance(first, Logits) else None


# What is known of a function of logits: each returns its result, or None if it is not known with these arguments.


def _step(name: str) -> Callable[..., Logits | None]:
    def known(me: Logits, other: Any = None, **more: Any) -> Logits | None:
        number = isinstance(other, int | float) and not isinstance(other, bool)
        if more or (name == "tanh") != (other is None) or not (number or name == "tanh"):
            return None
        return _with(me, Step(name, other))

    return known


def _with(me: Logits, step: Step) -> Logits:
    return me._like(me.hidden, replace(me.head, steps=(*me.head.steps, step)), False)


def _add(me: Logits, other: Any, **more: Any) -> Logits | None:
    """Add one value for each word, without a gradient (BART's `final_logits_bias`)."""
    size = len(me.head.weight)
    if more or not isinstance(other, Tensor) or other.requires_grad or other.numel() != size or other.shape[-1] != size:
        return None
    return _with(me, Step("add", other.reshape(size))) if other.dim() <= me.dim() and other.dtype == me.dtype else None


def _to(me: Logits, *args: Any, **more: Any) -> Logits | None:
    wanted = [*args, *more.values()]
    if any(isinstance(w, bool | Tensor) or (w is not None and not _same(me, w)) for w in wanted):
        return None
    dtype = next((w for w in wanted if isinstance(w, torch.dtype)), me.dtype)
    return me if dtype == me.dtype else _with(me, Step("to", dtype))


def _same(me: Logits, wanted: Any) -> bool:
    """Return whether what `to` asks for is a dtype of real numbers, or the device where the logits are."""
    if isinstance(wanted, torch.dtype):
        return wanted.is_floating_point
    return isinstance(wanted, str | torch.device) and torch.device(wanted) == me.device


def _contiguous(me: Logits, **more: Any) -> Logits | None:
    return None if more else me


def _view(me: Logits, *shape: Any, **more: Any) -> Logits | None:
    if len(shape) == 1 and isinstance(shape[0], tuple | list):
        shape = tuple(shape[0])
    if more or not shape or not all(isinstance(n, int) for n in shape) or shape[-1] != me.shape[-1]:
        return None
    return me._like(me.hidden.reshape(*shape[:-1], me.hidden.shape[-1]), me.head, True)


def _item(me: Logits, index: Any) -> Logits | None:
    """Take some places; the words of each stay."""
    found = list(index) if isinstance(index, tuple) else [index]
    if not all(i is Ellipsis or (isinstance(i, int | slice | Tensor) and not isinstance(i, bool)) for i in found):
        return None
    named = [i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in found if i is not Ellipsis]
    ends = any(i is Ellipsis for i in found) and found[-1] is not Ellipsis
    if (ends or sum(named) >= me.dim()) and not (isinstance(found[-1], slice) and found[-1] == slice(None)):
        return None
    return me._like(me.hidden[tuple(found)], me.head, True)


def _unbind(me: Logits, dim: int = 0) -> tuple[Logits, ...] | None:
    if dim != 0 or me.dim() < 2:
        return None
    return tuple(me._like(part, me.head, True) for part in me.hidden.unbind(0))


def _cross_entropy(
    me: Logits, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = _IGNORED,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """Return the mean, sum or list of the losses; as torch, the mean over no label is not a number."""
    plain = weight is None and size_average is None and reduce is None and isinstance(target, Tensor)
    if not plain or me.dim() != 2 or target.shape != me.shape[:1] or target.dtype != torch.int64:
        return None
    if me.graph != torch.is_grad_enabled() and me.hidden.requires_grad:
        return None
    valid = target.ne(ignore_index)
    count = None if me.waiting.count is None else min(me.waiting.count, len(target))
    places = (valid.nonzero() if count is None else torch.nonzero_static(valid, size=count))[:, 0]
    losses = token_losses(me.hidden, me.head, places, target[places], label_smoothing, count is not None)
    if count is not None:
        run = sum(s.stop - s.start for s in spans(count, rows(len(me.head.weight), me.device), True))
        me.waiting.skipped += (count - run) * (4 if losses.requires_grad else 2) * me.head.weight.numel()
    wide = torch.is_autocast_enabled(me.device.type)  # whose list has this loss in float32
    dtype = torch.float32 if wide else me.dtype
    if reduction == "none":
        return losses.new_zeros(len(target)).index_put((places,), losses).to(dtype)
    total = losses.sum()
    return (total / len(places) if reduction == "mean" else total).to(dtype)


_KNOWN: dict[Any, Callable[..., Any]] = {
    functional.cross_entropy: _cross_entropy,
    Tensor.float: lambda me, **more: None if more else _to(me, torch.float32),
    Tensor.to: _to,
    Tensor.contiguous: _contiguous,
    Tensor.__getitem__: _item,
    Tensor.unbind: _unbind,
    torch.unbind: _unbind,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _view),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _step("tanh")),
    **dict.fromkeys((Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__), _step("mul")),
    **dict.fromkeys((Tensor.div, torch.div, Tensor.__truediv__, torch.true_divide), _step("div")),
    **dict.fromkeys((Tensor.add, torch.add, Tensor.__add__), _add),
}


def pieces(logits: Tensor, places: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of chosen places, float32 `[tokens, vocabulary]`, and which they are; deferred ones in chunks.

    Args:
        logits: `[batch, places, vocabulary]`.
        places: rows and columns of the logits.
    """
    chosen = logits[places]
    if isinstance(chosen, Logits):
        for part in spans(len(chosen), rows(chosen.shape[-1], chosen.device), chosen.waiting.count is not None):
            yield part, chosen[part].whole().float()  # type: ignore[attr-defined]
    else:
        yield slice(None), chosen.float()  # the prompts' logits are not widened


def source(output: Tensor) -> Tensor:
    """Return a tensor that a model's output depends on: of deferred logits the hidden states, else itself."""
    return output.hidden if isinstance(output, Logits) else output


def has_head(model: nn.Module) -> bool:
    """Return whether the model has a head whose logits may be deferred, see `obstacle`."""
    return _head(model) is not None


def obstacle(model: nn.Module) -> str:
    """Return why a model's head cannot be deferred; empty if it can, or if the model has none."""
    head = _head(model)
    if head is None:
        return ""
    if model._compiled_call_impl is not None:
        return "the model is compiled"
    if type(head) is not nn.Linear:
        return "an adapter is on the head" if isinstance(head, Adapted) else f"the head is a {type(head).__name__}"
    if any(p.requires_grad for p in head.parameters()):
        return "the head is trained"
    if is_packed(head.weight):
        return "the head's weight is packed"
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if "forward" in vars(head) or any(hooks):
        return "something hooks into the head"
    return ""


def _head(model: Any) -> Any:
    """Return the module that makes a model's logits over a vocabulary; None if it has none."""
    ask = getattr(model, "get_output_embeddings", None)
    try:
        found = ask() if ask is not None else None
    except (AttributeError, NotImplementedError):  # models without one
        return None
    return found if isinstance(found, nn.Module) else None


@contextlib.contextmanager
def deferred(model: nn.Module, on: bool = True, count: int | None = None) -> Iterator[Waiting]:
    """Let the model's head return `Logits` inside, where that is possible; yield what becomes of them.

    Args:
        model: any model; one without a frozen linear head runs as it is.
        on: do nothing if False.
        count: the number of labelled places, where tensors have no values.
    """
    head, waiting = _head(model) if on and not obstacle(model) else None, Waiting(count)
    if head is None:
        yield waiting
        return

    def forward(input: Tensor) -> Tensor:  # noqa: A002  the name that nn.Linear gives it
        kind = input.device.type
        cast = torch.is_autocast_enabled(kind)
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if traced or (input.dtype != head.weight.dtype and not cast):
            return functional.linear(input, head.weight, head.bias)
        dtype = torch.get_autocast_dtype(kind) if cast else head.weight.dtype
        return _made(input, Head(head.weight, head.bias, dtype), torch.is_grad_enabled(), waiting)

    vars(head)["forward"] = forward
    try:
        yield waiting
    finally:
        del vars(head)["forward"]
