"""Plans for a Hugging Face PEFT adapter_config.json: with PEFT's own modules, or as our equal method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftree.errors import ConfigError, StoreError, did_you_mean
from peftree.optimizers import DEFAULT
from peftree.plan import formulas, kept, sizes, skeleton
from peftree.plan.batch import inputs, open_images
from peftree.plan.hfpeft import modules
from peftree.plan.ledger import Timeline
from peftree.plan.question import FILE, Request
from peftree.plan.reserved import Beside, adamw, reserved
from peftree.plan.result import Whole
from peftree.plan.step import recompute
from peftree.plan.step import traced as described
from peftree.store.hfpeft import dialects
from peftree.store.hfpeft.names import saves_heads
from peftree.store.hfpeft.schema import Targeted, parse

_INSTEAD = "Plan it with PEFT's own code: code=peft."


@dataclass(frozen=True)
class Theirs:
    """What PEFT's modules take in a step.

    Attributes:
        whole: the full model's figures.
        parts: phase -> part -> bytes at the phase's peak.
        operations: floating-point operations.
        held: bytes that CUDA's caching allocator reserves for one step; 0 if its rules were not replayed.
    """

    whole: Whole
    parts: dict[str, dict[str, float]]
    operations: float
    held: int


def ours(config: Any, kind: Any, raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and fields of our method that equals PEFT's config `raw` on a model; does not need `peft`.

    Raises:
        StoreError: peftree has no equal of it; the message says what differs.
    """
    asked, where = str(raw["peft_type"])[:80], Path(FILE)
    mine = [d for d in dialects() if d.peft_type == asked]
    if not mine:
        known = did_you_mean(asked, {d.peft_type for d in dialects()})
        raise StoreError(f"{where}: no method of peftree is PEFT's {asked!r}.", f"{known} {_INSTEAD}")
    dialect = next((d for d in mine if d.reads(raw)), mine[0])
    model = skeleton.build(config, kind)
    try:
        read = parse(dialect.schema, raw, where)
        if isinstance(read, Targeted) and not read.target_modules:
            raise StoreError(f"{where} names no target_modules; PEFT then chooses them by the model's type.", "")
        saves_heads(model, read.modules_to_save or [], where)
        return dialect.method(read, model, where)
    except StoreError as error:
        raise StoreError(error.what, _INSTEAD) from None


def traced(config: Any, kind: Any, request: Request, dtype: torch.dtype, quick: bool = False) -> Theirs:
    """Put PEFT's modules on the model, with all its layers, and trace one step; `quick` as in `estimate.plan`.

    Raises:
        ConfigError: PEFT is not installed, or does not know the method or a field.
        MethodError: PEFT's code needs real weights.
    """

    def base() -> nn.Module:
        model = skeleton.build(config, kind, dtype, request.attention)
        open_images(model)
        recompute(model, request.gradient_checkpointing)
        return model

    def run() -> tuple[Timeline, tuple[Whole, Beside, int]]:
        batch = inputs(base(), request, labels=request.mode == "train")
        placed = modules.put(base, request.peft)
        whole, beside = _whole(placed, request, kind.__name__), _beside(placed, request)
        line, operations = modules.trace(placed, batch, request)
        return line, (whole, beside, operations)

    if request.mode == "generate":
        raise ConfigError("Generation with PEFT's modules cannot be planned.", "Set code=peftree, or mode=eval.")
    if quick:
        line, (whole, beside, operations) = sizes.line(sizes.key(request), request.batch_size, request.length, run)
    else:
        line, (whole, beside, operations) = run()
        sizes.remember(sizes.key(request), request.batch_size, request.length, line, (whole, beside, operations))
    step = described(line, config, {})
    parts: dict[str, dict[str, float]] = {phase: dict(held) for phase, held in step.parts.items()}
    return Theirs(whole, parts, float(operations), _held(line, beside, request, formulas.packed_form(config, request)))


def _whole(placed: modules.Foreign, request: Request, name: str) -> Whole:
    model, training = placed.model, request.mode == "train"
    trained = [p for p in model.parameters() if p.requires_grad]
    plain, packed = formulas.packed_bytes(model.config, request, model)
    weights = placed.weights - plain + packed
    state = kept.optimizer_state(trained, request.optimizer) if training else 0
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    layer = max((formulas.size(one.parameters()) for layers in lists for one in layers), default=0)
    added = sum(1 for m in model.modules() if "base_layer" in m._modules)
    return Whole(
        name, {"weights": weights, "adapter": sum(placed.adapter), "optimizer": state},
        kept.optimizer_scratch(trained, request.optimizer, request.device), layer,
        sum(placed.trained) if training else 0, placed.trainable, placed.total, added, shared=True,
    )  # fmt: skip


def _beside(placed: modules.Foreign, request: Request) -> Beside:
    trained = [p.numel() * p.element_size() for p in placed.model.parameters() if p.requires_grad]
    known = adamw(trained)
    if request.optimizer != "adamw_torch":
        known["scratch"] = []
    return Beside(placed.weights, placed.adapter, **known)


def _held(line: Timeline, beside: Beside, request: Request, form: str) -> int:
    """Replay a first step, and another after emptying the cache, as the allocator does before it gives up."""
    plain = form == "none" and request.devices == 1 and request.accumulation == 1
    known = request.optimizer in (DEFAULT, "adamw_torch")
    if request.device != "cuda" or request.mode != "train" or not plain or not known:
        return 0
    return reserved([line, line], beside, emptied=[0])
