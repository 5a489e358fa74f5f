"""Traces one training step, evaluation or prefill of a skeleton and reports what its memory is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from peftree.adapter import Adapter, adapt
from peftree.evaluate.quality import token_scores
from peftree.loss import deferred
from peftree.named_method import make_method
from peftree.plan import skeleton
from peftree.plan.batch import inputs, open_images, scored
from peftree.plan.ledger import Ledger, Timeline, faking, record
from peftree.plan.question import Request
from peftree.precision import DTYPES, autocast
from peftree.tasks.packing import check_deltas

MOVING = ("gradients", "activations", "logits", "temporaries")  # the parts of a timeline
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "temporaries")


@dataclass(frozen=True)
class Traced:
    """What a traced step held, beyond weights and optimizer state.

    Attributes:
        parts: phase -> part -> bytes at the phase's peak.
        operations: floating-point operations by phase.
        timeline: every allocation and release.
        vocabulary: the number of tokens that logits are for; 0 if there are none.
    """

    parts: dict[str, dict[str, int]]
    operations: dict[str, int]
    timeline: Timeline
    vocabulary: int


def adapted(config: Any, kind: Any, request: Request, dtype: torch.dtype) -> tuple[nn.Module, Adapter]:
    """Return the skeleton with the request's method on it."""
    model = skeleton.build(config, kind, dtype, request.attention)
    with _Undrawn():
        adapter = adapt(model, make_method(request), head=request.head)
    if request.packing:
        check_deltas(adapter)
    recompute(model, request.gradient_checkpointing)
    if request.activations == "recompute" and request.mode == "train":
        adapter.activations = "recompute"
    model.train(request.mode == "train")
    return model, adapter


def recompute(model: Any, on: bool, **settings: bool) -> None:
    """Let a model recompute its layers in the backward pass."""
    if on:
        model.config.use_cache = False
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, **settings})


def trace(model: nn.Module, adapter: Adapter, request: Request, scores: bool = False) -> Traced:
    """Run the request's step on fake tensors; `model` then holds fake tensors and cannot be used for anything else.

    `scores`: whether tokens are scored after the forward pass, as a task does.
    """
    open_images(model)
    batch, labelled = inputs(model, request, labels=request.mode == "train"), scored(model, request)
    wanted = torch.empty(labelled if scores else 0, dtype=torch.long, device="meta")
    with faking(model) as fake, _texts("position_ids" in batch):
        fed = {k: fake(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        wanted = fake(wanted)
        held = [v for v in (*fed.values(), wanted) if isinstance(v, Tensor)]
        ledger = Ledger([*model.parameters(), *model.buffers(), *held], scratch=request.device == "cpu")
        if request.mode == "train":
            phases = _training(model, adapter, fed, request, ledger, labelled)
        else:
            phases = _reading(model, fed, request, ledger, wanted)
        with Fused(request.precision) if request.device == "cuda" else nullcontext():
            timeline, operations = record(phases, ledger)
    return traced(timeline, model.config, operations)


def traced(timeline: Timeline, config: Any, operations: dict[str, int]) -> Traced:
    """Return the parts of a timeline, for a model of `config`."""
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    parts = {phase: _parts(timeline, phase, vocabulary) for phase in timeline.phases}
    return Traced(parts, operations, timeline, vocabulary)


@contextmanager
def _texts(joined: bool) -> Iterator[None]:
    """Make transformers take positions as those of one text per row, or several, which it reads from their values."""
    own = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: position_ids.cumsum(-1) if joined else None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


class _Undrawn(TorchFunctionMode):
    """Every place that a method draws is the first one: which ones they are does not affect memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; a permutation takes no time and, since its pages stay untouched, no memory."""
        if func is torch.randperm and "device" not in (kwargs or {}):
            return torch.from_numpy(np.zeros(args[0], dtype=np.int64))
        return func(*args, **(kwargs or {}))


class Fused(TorchFunctionMode):
    """What CUDA does otherwise than a CPU: fused attention, and the operations that its autocast leaves in float32.

    Its kernels drop out attention weights without storing them. Its list is that of torch's page on autocast; the one
    of a CPU has few of them.
    """

    def __init__(self, precision: str = "float32") -> None:
        super().__init__()
        self.low = DTYPES.get(precision)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, attention without dropout, and what CUDA computes in float32 on float32."""
        more = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention and "dropout_p" in more:
            more["dropout_p"] = 0.0
        name = func.__name__
        if self.low is None or name not in _WIDE or not torch.is_autocast_enabled("cpu"):
            return func(*args, **more)
        wide = [a.float() if isinstance(a, Tensor) and a.dtype == self.low else a for a in args]
        if name not in _WIDENS:
            return func(*wide, **more)
        return func(*args, **more | ({} if more.get("dtype") else {"dtype": torch.float32}))


# By name: what widens as it computes, and what takes widened copies.
_WIDENS = {"softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum"}
_WIDE = _WIDENS | {
    *("pow", "__pow__", "exp", "log", "log1p", "expm1", "rsqrt", "reciprocal", "norm", "softplus", "cosine_similarity"),
    *("layer_norm", "group_norm", "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div"),
}


Phases = list[tuple[str, Callable[[], object]]]


def _training(
    model: nn.Module, adapter: Adapter, batch: dict[str, Any], request: Request, ledger: Ledger, labelled: int
) -> Phases:  # fmt: skip
    kept: dict[str, Any] = {}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def forward() -> None:
        passing = autocast(torch.device("cpu"), request.precision)
        with passing, deferred(model, request.defers_logits, labelled) as waiting:
            out = model(**batch)
            extra = adapter.aux_loss(1, 100, out, lambda: model(**batch))
            kept["loss"] = out.loss if extra is None else out.loss + extra
            del out, extra
        ledger.operations += waiting.skipped
        ledger.keep("activations", ledger.living())

    def backward() -> None:
        kept.pop("loss").backward()
        ledger.keep("gradients", [p.grad for p in parameters])

    phases: Phases = [("forward", forward), ("backward", backward)]
    return phases if request.accumulation == 1 else [("first forward", forward), ("first backward", backward), *phases]


def _reading(model: nn.Module, batch: dict[str, Any], request: Request, ledger: Ledger, wanted: Tensor) -> Phases:
    more = {"use_cache": True, "logits_to_keep": 1} if request.mode == "generate" else {}
    logits: list[Tensor] = []

    @torch.no_grad()
    def forward() -> None:
        with deferred(model, len(wanted) > 0 and request.chunked_loss, len(wanted)):
            out = model(**batch, **more)
        ledger.keep("activations", ledger.living())
        logits.extend([out.logits] if len(wanted) else [])

    @torch.no_grad()
    def score() -> None:
        token_scores(logits.pop(), (wanted, wanted), wanted)

    return [("forward", forward), ("scores", score)] if len(wanted) else [("forward", forward)]


def part_of(timeline: Timeline, number: int, vocabulary: int) -> str:
    """Return which part of a step's memory a storage belongs to."""
    gradients, activations = (timeline.kept.get(name, frozenset()) for name in ("gradients", "activations"))
    shape = timeline.shape[number]
    if number in gradients:
        return "gradients"
    if vocabulary and shape and shape[-1] == vocabulary:
        return "logits"
    return "activations" if number in activations else "temporaries"


def _parts(timeline: Timeline, phase: str, vocabulary: int) -> dict[str, int]:
    """Return the bytes of each part at the peak of the phase."""
    out = dict.fromkeys(MOVING, 0)
    for number in timeline.alive(phase):
        out[part_of(timeline, number, vocabulary)] += timeline.size[number]
    return out
