"""What a plan says beside what torch's own allocator says, of tiny models; shared by tests and the table of truths."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from peftree.adapter import Adapter, adapt
from peftree.evaluate.cost import allocator_peak
from peftree.loss import deferred
from peftree.plan.question import Request, request
from peftree.plan.step import Traced, adapted, recompute, trace
from peftree.precision import autocast
from peftree.registry import make

MODELS = {"decoder": "llama", "encoder": "bert_cls", "vit": "vit"}
ATTENTIONS = ("eager", "sdpa")
ROWS = 3


def asked(key: str, method: str, attention: str = "eager", **values: Any) -> Request:
    """Return the request that `zoo.batch(key)` fits, without its mask."""
    given = {"batch_size": ROWS, "max_length": zoo.LENGTH, "padded": False, "device": "cpu", "dtype": "float32"}
    chosen = {"name": method, **values.pop("fields", {})}
    return request(model=key, method=chosen, attention=attention, **(given | values))


def traced(key: str, wanted: Request) -> Traced:
    """Return the traced step of the model `key` as `wanted` says."""
    base = zoo.build(key)
    model, adapter = adapted(base.config, type(base), wanted, getattr(torch, wanted.dtype))
    return trace(model, adapter, wanted)


def real(key: str, wanted: Request) -> tuple[nn.Module, Adapter, dict[str, Tensor]]:
    """Return the same model with values, its adapter, ready to train, and a batch."""
    model: Any = zoo.build(key).to(getattr(torch, wanted.dtype))
    model.set_attn_implementation(wanted.attention)
    adapter = adapt(model, make(wanted.method.name, wanted.method.fields))
    batch = {k: v[:, : wanted.length] if v.dim() == 2 else v for k, v in zoo.batch(key, wanted.batch_size).items()}
    if not wanted.padded:
        batch.pop("attention_mask", None)
    if "labels" in batch and batch["labels"].dim() == 2:  # a plan without rows is of tokens that are all learned
        batch["labels"] = torch.where(batch["labels"].eq(-100), 9, batch["labels"])
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    if adapter.method.tags.needs_data:
        adapter.init([lambda: model(**batch).loss])
    if wanted.activations == "recompute":
        adapter.activations = "recompute"
    if wanted.gradient_checkpointing:
        recompute(model, True, preserve_rng_state=False)
    return model.train(), adapter, batch


def loss(
    model: nn.Module, adapter: Adapter, batch: dict[str, Tensor], precision: str = "float32", chunked: bool = True
) -> Tensor:  # fmt: skip
    """Return what training would differentiate, the method's own term included."""
    with autocast(torch.device("cpu"), precision):
        with deferred(model, chunked):
            out = model(**batch)
            extra = adapter.aux_loss(1, 100, out, lambda: model(**batch))
        found: Tensor = out.loss if extra is None else out.loss + extra
    return found


def real_peak(key: str, wanted: Request) -> int:
    """Return the most bytes that the allocator held in a step, forward and backward, as often as `wanted` says."""
    model, adapter, batch = real(key, wanted)

    def step() -> None:
        for _ in range(min(wanted.accumulation, 2)):
            loss(model, adapter, batch, wanted.precision, wanted.chunked_loss).backward()
        model.zero_grad(set_to_none=True)

    half = "bf16" in wanted.precision or wanted.dtype == "bfloat16"
    with native() if half else nullcontext(), quiet():
        step()  # tables that a first step makes are there afterwards
        return allocator_peak(step)


def native() -> AbstractContextManager[None]:
    """Let torch's own code multiply: what oneDNN takes inside a bfloat16 product hangs on the CPU (AMX)."""
    off: AbstractContextManager[None] = torch.backends.mkldnn.flags(False, None, None, None)
    return off


@contextmanager
def quiet() -> Iterator[None]:
    """Let the profiler start and stop without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Pp]rofiler.*")
        yield
