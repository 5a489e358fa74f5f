"""The planner: builds the model without weights, traces few of its layers, and works out the rest.

Layers of one kind hold the same bytes, so memory grows by the same amount with each: the step is traced with two depths
and the difference carried on to the whole depth, phase by phase and part by part. What every layer shares (embedding,
head, logits, loss) is in both and cancels. Weights, gradients of the optimizer's state are counted on the full model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from peftree.adapter import Adapter
from peftree.errors import ConfigError, PeftreeError
from peftree.plan import between, formulas, skeleton, theirs
from peftree.plan.batch import position_table
from peftree.plan.request import Request
from peftree.plan.reserved import WORKSPACE
from peftree.plan.result import Plan, Whole
from peftree.plan.step import PARTS, Traced, adapted, trace
from peftree.plan.step import traced as described
from peftree.plan.trace import Timeline, supported

# Settings that the full model's own figures do not depend on.
_APART: dict[str, Any] = {"batch": 1, "length": 1, "accumulation": 1, "checkpointing": False, "memory": 0}
FRAGMENTS = 0.03  # of what moves; see `reserved`
MALLOC = 0.25  # of what moves on a CPU; see `resident`
SLACK = {"cuda": 0.05, "cpu": 0.12}  # of what varies, in the high figure
CONTEXT = 600 << 20  # bytes that a CUDA process takes for itself; no allocator counts them
Parts = dict[str, dict[str, float]]


def plan(request: Request, quick: bool = False) -> Plan:
    """Return what `request` takes; no weights are read, nothing runs.

    Args:
        request: the setting.
        quick: where traces at other sizes tell the memory exactly, do not trace; operations are then not counted.

    Raises:
        ConfigError: no config, an unknown task, or a mode that the model does not have; PEFT is not installed.
        MethodError, SiteError: the method does not fit the model.
        StoreError: no method of ours is what the adapter's file says.
    """
    request = settled(request)
    quick = quick and request.device == "cuda"  # a CPU's kernels take scratch that grows in steps
    return _planned(request.model_copy(update={"memory": 0}).model_dump_json(), quick).ask(request)


def settled(request: Request) -> Request:
    """Return the request with our own method in the place of an adapter's file, if our code is to train it."""
    if not request.adapter or request.code == "peft":
        return request
    found = _ours(request.model, request.task, request.labels, json.dumps(request.adapter))
    return request.model_copy(update={"method": found[0], "fields": found[1], "adapter": {}})


@lru_cache(maxsize=32)
def _ours(model: str, task: str, labels: int, adapter: str) -> tuple[str, dict[str, Any]]:
    return theirs.ours(*read(model, task, labels), json.loads(adapter))


@lru_cache(maxsize=512)
def _planned(text: str, quick: bool) -> Plan:
    request = Request.model_validate_json(text)
    config, kind = read(request.model, request.task, request.labels)
    if request.mode == "generate" and not kind.can_generate():
        raise ConfigError(f"{kind.__name__} generates no text.", "Plan it with mode=train or mode=eval.")
    dtype = formulas.dtype_of(config, request.dtype)
    if request.adapter:
        return _of_peft(theirs.traced(config, kind, request, dtype, quick), request)
    whole = _whole(request.model_copy(update=_APART).model_dump_json())
    notes: list[str] = []
    how, operations = "traced", 0.0
    found: Parts = {}
    why = "" if supported() else f"torch {torch.__version__} is not among the tested versions"
    if not why:
        try:
            found, operations = traced(config, kind, request, dtype, whole.shared, quick)
        except PeftreeError:
            raise
        except Exception as error:  # noqa: BLE001  a model's own code may want real values
            why = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:120]}"
    if why:
        how = "formula"
        notes.append(f"not traced ({why}): a rule of thumb, far less exact")
        found = rough(config, request, dtype, whole.gradients)
    phases = _phases(whole, found, request)
    if request.mode == "generate":
        phases["generation"] = _generation(config, whole, request, dtype)
    return _plan(request, whole, phases, 0 if quick else round(operations), how, notes)


def _of_peft(found: theirs.Theirs, request: Request) -> Plan:
    phases = _phases(found.whole, found.parts, request)
    notes = ["traced with PEFT's own modules; with peftree's: --code peftree"]
    return _plan(request, found.whole, phases, round(found.operations), "traced", notes, found.held)


def _phases(whole: Whole, found: Parts, request: Request) -> dict[str, dict[str, int]]:
    phases = {name: _with(whole, parts, request, name) for name, parts in found.items()}
    if request.mode == "train":
        step = {"gradients": whole.gradients, "temporaries": whole.scratch}
        phases["optimizer"] = _with(whole, step, request, "step")
    return phases


def traced(
    config: Any, kind: Any, request: Request, dtype: torch.dtype, whole: bool = False, quick: bool = False
) -> tuple[Parts, float]:
    """Return phase -> part -> bytes of the whole depth, and operations, from traces of few layers.

    `whole`: trace all of them; `quick`: as in `plan`.
    """
    stacks = [] if whole else _cuttable(config, request)
    base = {d: d.period + 1 + (d.count - 1) % d.period for d in stacks}  # whole periods are left

    def run(counts: Mapping[skeleton.Depth, int]) -> Traced:
        small = skeleton.cut(config, dict(counts))
        setting = between.key(request, sorted((d.part, d.key, n) for d, n in counts.items()))

        def real() -> tuple[Timeline, dict[str, int]]:
            made = trace(*adapted(small, kind, request, dtype), request)
            return made.timeline, made.operations

        if quick:
            line, operations = between.line(setting, request.batch, request.length, real)
        else:
            line, operations = real()
            between.remember(setting, request.batch, request.length, line, operations)
        return described(line, small, operations)

    first = run(base)
    total: Parts = {phase: dict(parts) for phase, parts in first.parts.items()}
    operations = float(sum(first.operations.values()))
    for depth in stacks:
        more = run(base | {depth: base[depth] + depth.period})
        times = (depth.count - base[depth]) / depth.period
        for phase, parts in more.parts.items():
            for part, value in parts.items():
                total[phase][part] += times * (value - first.parts[phase][part])
        operations += times * (sum(more.operations.values()) - sum(first.operations.values()))
    return total, operations


def _cuttable(config: Any, request: Request) -> list[skeleton.Depth]:
    """Return the stacks to trace with fewer layers: those deep enough, unless the request names layers."""
    chosen = str(request.fields)
    if "layers" in request.fields or "@" in chosen or re.search(r"\.\d+\.", chosen):
        return []
    return [d for d in skeleton.depths(config) if d.count > 2 * d.period + 1]


@lru_cache(maxsize=8)
def read(model: str, task: str, labels: int) -> tuple[Any, Any]:
    """Return the config and the class of the model that a request names."""
    config = skeleton.read_config(model)
    kind = skeleton.model_class(config, task)
    if kind.__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
        config.num_labels = labels
    return config, kind


def positions(request: Request) -> int:
    """Return the most tokens that the model of a request takes in a row, as its config says."""
    config, kind = read(request.model, request.task, request.labels)
    small = skeleton.build(skeleton.cut(config, dict.fromkeys(skeleton.depths(config), 1)), kind)
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    return min(int(most), position_table(small) or int(most))


@lru_cache(maxsize=128)
def _whole(text: str) -> Whole:
    """Count weights, adapter, gradients and optimizer state on the full model."""
    request = Request.model_validate_json(text)
    config, kind = read(request.model, request.task, request.labels)
    dtype = formulas.dtype_of(config, request.dtype)
    model, adapter = adapted(config, kind, request, dtype)
    mine = {id(p) for p in adapter.parameters()}
    trained = [p for p in adapter.parameters() if p.requires_grad]
    base = [p for p in model.parameters() if id(p) not in mine]
    low = formulas.linear_weights(model) if request.base != "dense" else []
    weights = formulas.size(base) - formulas.size(low) + formulas.quantised(low, request.base)
    buffers = {id(b): b for b in model.buffers()}.values()
    training = request.mode == "train"
    parts = {
        "weights": weights,
        "adapter": formulas.size([*adapter.parameters(), *buffers]),
        "optimizer": formulas.optimizer_state(trained, request.optimizer) if training else 0,
    }
    scratch = formulas.optimizer_scratch(trained, request.optimizer)
    return Whole(
        type(model).__name__, parts, scratch, _largest_layer(model), formulas.size(trained) if training else 0,
        sum(p.numel() for p in trained), sum(p.numel() for p in base), len(adapter.deltas), _shares(adapter),
    )  # fmt: skip


def _shares(adapter: Adapter) -> bool:
    """Return whether layers share trained tensors, whose share of the memory then does not grow by the layer."""
    held = [id(p) for delta in adapter.deltas.values() for p in delta.parameters() if p.requires_grad]
    return len(held) > len(set(held))


def _largest_layer(model: nn.Module) -> int:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return max((formulas.size(layer.parameters()) for layers in lists for layer in layers), default=0)


def _with(whole: Whole, parts: Mapping[str, float], request: Request, phase: str) -> dict[str, int]:
    """Return all parts of a phase: what was traced, the weights, what sharding does to them."""
    out = dict.fromkeys(PARTS, 0) | whole.parts
    for part, value in parts.items():
        out[part] += formulas.rounded(max(value, 0))
    if request.base != "dense" and phase != "step":  # a layer's weight is read through a dense copy of it
        out["temporaries"] += whole.layer // 4
    gathered = whole.layer if phase != "step" else 0
    return formulas.sharded(out, request, gathered, whole.gradients)


def _generation(config: Any, whole: Whole, request: Request, dtype: torch.dtype) -> dict[str, int]:
    """Return the parts while the last token is made: the whole cache, and one layer's copy that grows."""
    tokens = request.length + request.new_tokens
    held = formulas.cache(config, request.batch, tokens, dtype.itemsize)
    layers = max((d.count for d in skeleton.depths(config)), default=1)
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    logits = request.batch * vocabulary * (dtype.itemsize + 4)
    return _with(whole, {"activations": held, "temporaries": held / layers, "logits": logits}, request, "generation")


def rough(config: Any, request: Request, dtype: torch.dtype, gradients: int) -> Parts:
    """Return phase -> part -> bytes by a rule of thumb: 34 bytes an activation of a layer (arXiv 2205.05198, eq. 2)."""
    text = config.get_text_config()
    width = int(getattr(text, "hidden_size", 0) or 0)
    layers = sum(d.count for d in skeleton.depths(config)) or 1
    if not width:
        raise ConfigError(f"{type(config).__name__} states no width.", "Use a config with hidden_size.")
    rows = request.batch * request.length * width
    kept = rows * dtype.itemsize * (layers if request.checkpointing else 17 * layers)
    vocabulary = int(getattr(text, "vocab_size", 0) or 0)
    logits = request.batch * request.length * vocabulary * (dtype.itemsize + 8)
    if request.mode != "train":
        return {"forward": {"activations": 8.0 * rows * dtype.itemsize, "logits": float(logits)}}
    return {
        "forward": {"activations": float(kept), "logits": float(logits)},
        "backward": {"activations": float(kept), "logits": float(logits), "gradients": float(gradients)},
    }


def _plan(
    request: Request,
    whole: Whole,
    phases: dict[str, dict[str, int]],
    operations: int,
    how: str,
    notes: list[str],
    held: int = 0,
) -> Plan:
    """Put it together; `held`: what a replay of the allocator found, if there was one."""
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    phase = max(totals, key=lambda name: totals[name])
    low = totals[phase]
    still = whole.parts["weights"]
    expected = (
        resident(low, still + whole.parts["adapter"]) if request.device == "cpu" else held or reserved(low, still)
    )
    margin = SLACK[request.device] if how == "traced" else 0.5
    high = round(expected + margin * (expected - min(still, expected)))
    if request.device == "cuda":
        notes.append(f"a CUDA process takes some {CONTEXT >> 20} MiB more for its context")
    else:
        notes.append(
            "under glibc, MALLOC_MMAP_THRESHOLD_=131072 in the environment keeps a process near the low figure"
        )
    return Plan(
        request, whole.model, low, expected, high, phase, totals, {k: v for k, v in phases[phase].items() if v},
        whole.trainable, whole.total, whole.sites, operations, how, tuple(notes),
    )  # fmt: skip


def reserved(low: int, still: int) -> int:
    """Return what CUDA's caching allocator reserves for a peak of `low` bytes, `still` of which never move.

    The workspaces of two threads, and a share for rounding and fragments: the median of the public runs that
    `docs/plan-truth-public.md` holds (2 to 17 %; full fine-tuning, whose optimizer makes large lists, has most).
    """
    return low + 2 * WORKSPACE + round(FRAGMENTS * max(low - still, 0))


def resident(low: int, still: int) -> int:
    """Return what a process has resident at a peak of `low` bytes, `still` of which never move.

    glibc keeps what is freed for later, in pieces that later tensors do not fit: one share for all methods, the mean of
    the real runs that `docs/plan-truth.md` holds (3 to 38 %).
    """
    return low + round(MALLOC * max(low - still, 0))
