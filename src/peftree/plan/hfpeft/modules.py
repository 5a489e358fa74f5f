"""Hugging Face PEFT's adapters on a model without weights: what their own modules hold in a training step.

PEFT's code is written for real weights. A model on the meta device is enough for most of its methods; the
others get more, in this order: adapters also on the meta device, base weights as fake tensors, base weights whose
values repeat a few random ones. Reading a fake tensor's values while the model is built or run gets an answer: a
zero for a number, all places for a mask.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from peftree.errors import ConfigError, MethodError
from peftree.plan.ledger import Ledger, Timeline, faking, record
from peftree.plan.question import Request, read_adapter
from peftree.plan.step import Fused

_SMALL = 1 << 16  # elements of a tensor whose values are kept where they are known
# Fields that are not passed on. AdaLoRA: init_r counts, and the pattern is what a run found. FRoD: weights that are not
# there cannot be moved to the CPU; those of the base stay counted.
_LEFT = {"ADALORA": ("r", "rank_pattern"), "FROD": ("runtime_offload_base_weight",)}
_DRAWN = {"ADAMSS"}  # methods whose shapes follow from values of the base, and which are quick to find them
_ITEM, _INDEX, _NONZERO, _MASKED, _RAND = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.sparse_mask.default,
    torch.ops.aten.rand.default,
)


@dataclass(frozen=True)
class Foreign:
    """A model with a PEFT adapter, without weights.

    Attributes:
        model: PEFT's model; the base's weights are on the meta device.
        how: the way in which the adapter was put on it.
        weights: bytes of the base's parameters.
        adapter: bytes of each other tensor that is on the accelerator: the adapter's, and the base's buffers.
        trained: bytes of each trained parameter.
        trainable: number of trained values.
        total: number of the base's values.
    """

    model: nn.Module
    how: str
    weights: int
    adapter: tuple[int, ...]
    trained: tuple[int, ...]
    trainable: int
    total: int


def put(base: Callable[[], nn.Module], config: Mapping[str, Any], cast: bool = True, freeze: str = "") -> Foreign:
    """Put PEFT's adapter on a model on the meta device.

    Args:
        base: makes the model; called once for each way that is tried.
        config: the content of adapter_config.json.
        cast: keep the adapter in float32 over a base of half precision, as PEFT does by default.
        freeze: parameters with this in their name are not trained, such as `lora_A` with the LoRA-FA optimizer.

    Raises:
        ConfigError: PEFT is not installed, or does not know the method or a field.
        MethodError: the method needs real weights.
    """
    made = _config(read_adapter(config))
    if made.is_prompt_learning and not made.task_type:
        raise ConfigError(f"PEFT's {made.peft_type} needs a task_type.", 'Add a task_type, such as "CAUSAL_LM".')
    said = ""
    for how, way in _WAYS if made.peft_type in _DRAWN else _WAYS[:-1]:
        model = base()
        own = list(model.parameters())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = way(model, made, cast)
        except Exception as error:  # noqa: BLE001 - its code reads what is not there, in one of many ways
            said = said or f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
            continue
        for name, parameter in done.named_parameters():
            if freeze and freeze in name:
                parameter.requires_grad_(False)
        return _measured(done, own, how)
    raise MethodError(f"PEFT's {made.peft_type} cannot be put on a model without weights: {said}.", _ELSE)


def real(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Put PEFT's adapter on a model that has its weights.

    Raises:
        ConfigError: PEFT is not installed, or does not know the method or a field.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _plain(model, _config(read_adapter(config)), True)


_ELSE = "In place of the file, plan the closest method of peftree: method=NAME."


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "Hugging Face PEFT is not installed.", "pip install peft, or plan with peftree's own code: code=peftree."
        ) from None
    return peft


def _config(values: dict[str, Any]) -> Any:
    """Return PEFT's own config object to train; without what only a saved adapter or a newer version writes."""
    types = _peft().mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    kind = values["peft_type"]
    if kind not in types:
        raise ConfigError(f"The installed PEFT has no method {kind}.", f"It has: {', '.join(sorted(types))}.")
    takes = set(inspect.signature(types[kind].__init__).parameters)
    left = {"peft_type", "auto_mapping", "peft_version", "inference_mode", *_LEFT.get(kind, ())}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return types[kind](**{k: v for k, v in values.items() if k in takes - left})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"PEFT refuses the {kind} config: {error}.", "Compare it with PEFT's documentation."
        ) from None


def _plain(model: nn.Module, config: Any, cast: bool) -> nn.Module:
    made: nn.Module = _peft().get_peft_model(model, config, autocast_adapter_dtype=cast)
    return made


def _on_meta(model: nn.Module, config: Any, cast: bool) -> nn.Module:
    with torch.device("meta"):
        return _plain(model, config, cast)


def _on_fakes(model: nn.Module, config: Any, cast: bool, device: str = "meta") -> nn.Module:
    with _given_back(model):
        with faking(nn.Module()):
            for module, name, own in _owned(model):
                module._parameters[name] = nn.Parameter(torch.empty_like(own, device=device), own.requires_grad)
        with _Answers():  # type: ignore[no-untyped-call]
            return _plain(model, config, cast)


def _on_values(model: nn.Module, config: Any, cast: bool) -> nn.Module:
    """Base weights are views of few random values: full rank, no memory."""
    with _given_back(model), torch.no_grad():
        values = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))
        for module, name, own in _owned(model):
            rows = own.shape[0]
            step = max(1, (values.numel() - own.numel() // rows) // rows) if own.dim() == 2 else 0
            shape = own.shape if own.dim() == 2 else (own.numel(),)
            view = values.to(own.dtype).as_strided(shape, (step, 1) if step else (1,)).view(own.shape)
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
        return _plain(model, config, cast)


_WAYS: tuple[tuple[str, Callable[[nn.Module, Any, bool], nn.Module]], ...] = (
    ("base on meta", _plain),
    ("adapter on meta too", _on_meta),
    ("base of fake tensors", _on_fakes),
    ("base of fake tensors on the CPU", partial(_on_fakes, device="cpu")),
    ("base of stand-in values", _on_values),
)


def _owned(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in list(model.modules()):
        for name, own in list(module._parameters.items()):
            if own is not None:
                yield module, name, own


@contextmanager
def _given_back(model: nn.Module) -> Iterator[None]:
    """Put the base's own parameters back after the block, whatever replaced them inside."""
    before = list(_owned(model))
    yield
    for module, name, own in before:
        own.requires_grad_(module._parameters[name].requires_grad)  # type: ignore[union-attr]
        module._parameters[name] = own


def whole(base: Callable[[], nn.Module]) -> Foreign:
    """Return the model without an adapter, all of it trained."""
    model = base().requires_grad_(True)
    return _measured(model, list(model.parameters()), "no adapter")


def _measured(model: nn.Module, own: list[nn.Parameter], how: str) -> Foreign:
    """Count bytes; a buffer that PEFT left on the CPU while the base is on meta never reaches the accelerator."""
    base = {id(p) for p in own}
    added: list[Tensor] = [p for p in model.parameters() if id(p) not in base]
    added += [b for b in model.buffers() if b.device.type == "meta" or not _tells(how)]
    trained = [p for p in model.parameters() if p.requires_grad]
    return Foreign(
        model, how, sum(_bytes(own).values()), tuple(_bytes(added).values()), tuple(_bytes(trained).values()),
        sum(p.numel() for p in trained), sum(p.numel() for p in own),
    )  # fmt: skip


def _tells(how: str) -> bool:
    """Return whether this way separates what is on the accelerator (meta) from what stays on the CPU."""
    return how in (_WAYS[0][0], _WAYS[2][0])


def _bytes(tensors: list[Any]) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def trace(placed: Foreign, batch: Mapping[str, Any], request: Request | None = None) -> tuple[Timeline, int]:
    """Return what a step allocates, and its operations; loss and outputs live until its end, as in a usual loop.

    `placed.model` then holds fake tensors and cannot be used for anything else.

    Args:
        placed: the model.
        batch: its input.
        request: the setting; only mode, accumulation and device matter; None: a training step on CUDA.

    Raises:
        MethodError: the method's code needs values.
    """
    asked = request or Request(model="-")
    model = placed.model.train(asked.mode == "train")
    buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    apart = [one for one in buffers if one[2].device.type == "cpu" and _tells(placed.how)]
    try:
        with warnings.catch_warnings(), faking(model) as fake:
            warnings.simplefilter("ignore")
            for module, name, buffer in apart:  # the roles change: what is on meta now must be copied to be used
                module._buffers[name] = buffer if _known(buffer) else torch.empty_like(buffer, device="meta")
            fed = {k: fake(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
            held = [v for v in fed.values() if isinstance(v, Tensor)]
            ledger = _Ledger([*model.parameters(), *model.buffers(), *held], scratch=asked.device == "cpu")
            with _Answers(), Fused() if asked.device == "cuda" else nullcontext():  # type: ignore[no-untyped-call]
                line, operations = record(_phases(model, fed, asked, ledger), ledger)
        return line, sum(operations.values())
    except Exception as error:  # whatever PEFT's code raises without values becomes one error of ours
        said = (str(error).strip().splitlines() or [""])[0][:120]
        raise MethodError(f"PEFT's code needs values: {type(error).__name__}: {said}.", _ELSE) from error


def _phases(
    model: nn.Module, batch: dict[str, Any], asked: Request, ledger: Ledger
) -> list[tuple[str, Callable[[], None]]]:
    kept: dict[str, Any] = {}

    def forward() -> None:
        with torch.set_grad_enabled(asked.mode == "train"):
            kept.update(out=model(**batch))
        ledger.keep("activations", ledger.living())
        if asked.mode != "train":
            kept.clear()

    def backward() -> None:
        kept["out"].loss.backward()
        kept.clear()
        ledger.keep("gradients", [p.grad for p in model.parameters()])

    if asked.mode != "train":
        return [("forward", forward)]
    phases: list[tuple[str, Callable[[], None]]] = [("forward", forward), ("backward", backward)]
    return phases if asked.accumulation == 1 else [("first forward", forward), ("first backward", backward), *phases]


def _known(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not tensor.is_floating_point() and tensor.numel() <= 64 and not _fake(tensor)


def _fake(value: Any) -> bool:
    return "FakeTensor" in {kind.__name__ for kind in type(value).__mro__} or bool(
        isinstance(value, nn.Parameter) and type(value.data).__name__ == "FakeTensor"
    )


class _Ledger(Ledger):
    """Also knows sparse tensors, which have no storage but hold two tensors that do."""

    def see(self, tensor: Tensor) -> None:
        """Record a tensor's storages."""
        if tensor.layout is torch.sparse_coo:
            super().see(tensor._indices())
            super().see(tensor._values())
        else:
            super().see(tensor)


class _Answers(TorchDispatchMode):
    """Answers reads of values: small real tensors keep theirs, and fake tensors get an answer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, on values if all of them are known."""
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fakes = [t for t in tensors if _fake(t)]
        small = all(t.numel() <= _SMALL and t.device.type == "cpu" for t in tensors)
        if (func is _RAND and args[0] == [1]) or (tensors and not fakes and small):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is _ITEM and fakes:
            return False if args[0].dtype == torch.bool else 0
        if func is _INDEX:
            args = (args[0], [self._places(i) for i in args[1]])
        if func is _MASKED:  # as many values as the mask has, of which a fake one knows none
            few = args[1]
            values = torch.ops.aten.new_empty(args[0], (few._nnz(),))
            return torch.sparse_coo_tensor(few._indices(), values, few.shape, check_invariants=False)
        if func is _NONZERO and fakes:
            return torch.ops.aten.new_empty(args[0], (args[0].numel(), args[0].dim()), dtype=torch.long)
        return func(*args, **kwargs)

    def _places(self, index: Any) -> Any:
        """Return positions for a mask of one dimension: its own if known, else all."""
        if index is None or index.dtype != torch.bool or index.dim() != 1:
            return index
        if _fake(index):
            return torch.ops.aten.new_empty(index, (index.numel(),), dtype=torch.long)
        with _disable_current_modes():
            return index.nonzero().flatten()
