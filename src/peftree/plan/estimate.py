"""The planner: builds the model without weights, traces a few of its layers, and computes the rest.

Layers of one kind hold the same bytes, so memory grows by the same amount with each. The step is traced at two depths
and the difference extended to the whole depth, phase by phase and part by part. What all layers share (embedding,
head, logits, loss) is in both and cancels. Weights, gradients and optimizer state are counted on the full model.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from peftree.adapter import Adapter
from peftree.errors import ConfigError, PeftreeError
from peftree.named_method import make_method
from peftree.optimizers import DEFAULT, check_name
from peftree.plan import caches, formulas, kept, layers, repeat, sizes, skeleton
from peftree.plan.batch import position_table, scoring
from peftree.plan.hfpeft import configs
from peftree.plan.ledger import Timeline, supported
from peftree.plan.question import Request
from peftree.plan.reserved import WORKSPACE
from peftree.plan.result import Plan, Whole
from peftree.plan.step import PARTS, Traced, adapted, trace
from peftree.plan.step import traced as described
from peftree.settings import DEFAULT_LENGTH, MethodConfig
from peftree.tasks.loading import changed

# Settings that the full model's own figures do not depend on.
_APART: dict[str, Any] = {
    "batch_size": 1, "max_length": 1, "accumulation": 1, "activations": "exact", "eval_batch_size": 1,
    "train_batch": None, "eval_batch": None,
}  # fmt: skip
FRAGMENTS = 0.03  # of what moves; see `reserved`
MALLOC = 0.25  # of what moves on a CPU; see `resident`
SLACK = {"cuda": 0.05, "cpu": 0.12}  # of what varies, in the high figure
CONTEXT = 600 << 20  # bytes that a CUDA process takes for itself; no allocator counts them
Parts = dict[str, dict[str, float]]


def plan(request: Request, quick: bool = False) -> Plan:
    """Return the memory that `request` takes; no weights are read, and nothing runs.

    Args:
        request: the setting.
        quick: do not trace if traces at other sizes give the memory exactly; operations are then not counted.

    Raises:
        ConfigError: no config, an unknown task, or a mode that the model does not have; a wrong field of the method,
            with its place; PEFT is not installed.
        MethodError, SiteError: the method does not fit the model.
        StoreError: no method in peftree equals what the adapter's file says.
    """
    if not request.peft:
        make_method(request)  # what is wrong with it is said with its place, which the cached questions below lack
    check_name(request.optimizer, request.where("optimizer"))
    request = settled(request)
    check_room(request)
    quick = quick and request.device == "cuda"  # a CPU's kernels take scratch that grows in steps
    return _planned(request.bare.model_dump_json(), quick).ask(request)


def settled(request: Request) -> Request:
    """Return the request as it can be planned: our own method for an adapter's file, if our code will train it;
    eager attention if the class has no other; and the length that a run takes if none is named.
    """
    if request.attention == "sdpa" and not model_of(request)[1]._supports_sdpa:
        request = request.model_copy(update={"attention": "eager"})
    if request.max_length is None:
        request = request.model_copy(update={"max_length": max(1, min(DEFAULT_LENGTH, positions(request)))})
    if not request.peft or request.code == "peft":
        return request
    found = _ours(_apart(request))
    return request.model_copy(update={"method": MethodConfig(name=found[0], fields=found[1]), "peft": {}})


@lru_cache(maxsize=32)
def _ours(text: str) -> tuple[str, dict[str, Any]]:
    request = Request.model_validate_json(text)
    return configs.ours(*model_of(request), request.peft)


@lru_cache(maxsize=512)
def _planned(text: str, quick: bool) -> Plan:
    request = Request.model_validate_json(text)
    config, kind = model_of(request)
    if request.mode == "generate" and not kind.can_generate():
        raise ConfigError(f"{kind.__name__} does not generate text.", "Plan it with mode=train or mode=eval.")
    dtype = formulas.dtype_of(config, request.dtype)
    if request.peft:
        return _of_peft(configs.traced(config, kind, request, dtype, quick), request)
    whole = _whole(_apart(request))
    notes = [] if kind._supports_sdpa else [f"{kind.__name__} has no fused attention: planned with eager"]
    how, operations = "traced", 0.0
    found: Parts = {}
    scores: Parts = {}
    why = "" if supported() else f"torch {torch.__version__} is not one of the tested versions"
    if not why:
        try:
            found, operations = traced(config, kind, request, dtype, whole.shared, quick)
            if request.mode == "train":
                scores, _ = traced(config, kind, scoring(request), dtype, whole.shared, quick, True)
        except PeftreeError:
            raise
        except Exception as error:  # noqa: BLE001  a model's own code may want real values
            why = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:120]}"
    if why:
        how = "formula"
        notes.append(f"not traced ({why}): a rule of thumb, far less exact")
        found = rough(config, request, dtype, whole.gradients, why)
        scores = rough(config, scoring(request), dtype, 0, why) if request.mode == "train" else {}
    if scores:
        found["scoring"] = max(scores.values(), key=lambda parts: sum(parts.values()))
    if scores and request.generate:
        notes.append("the cache of decoded rows is not counted; mode=generate counts it")
    phases = _phases(whole, found, request)
    if request.mode == "generate":
        phases["generation"] = _generation(config, whole, request, dtype)
    return _plan(request, whole, phases, 0 if quick else round(operations), how, notes)


def _of_peft(found: configs.Theirs, request: Request) -> Plan:
    phases = _phases(found.whole, found.parts, request)
    notes = ["traced with PEFT's own modules; for peftree's own: code=peftree"]
    return _plan(request, found.whole, phases, round(found.operations), "traced", notes, found.held)


def _phases(whole: Whole, found: Parts, request: Request) -> dict[str, dict[str, int]]:
    phases = {name: _with(whole, parts, request, name) for name, parts in found.items()}
    if request.mode == "train":
        step = {"gradients": whole.gradients, "temporaries": whole.scratch}
        phases["optimizer"] = _with(whole, step, request, "step")
    return phases


def traced(
    config: Any, kind: Any, request: Request, dtype: torch.dtype, shared: bool = False, quick: bool = False,
    scores: bool = False,
) -> tuple[Parts, float]:  # fmt: skip
    """Return phase -> part -> bytes of the whole depth, and operations, from traces of few layers.

    `shared`: layers share trained tensors; `quick`: as in `plan`; `scores`: as in `trace`.
    """
    # Whole periods of layers are left out.
    base = {d: d.period + 1 + (d.count - 1) % d.period for d in _cuttable(config, request)}

    def run(counts: Mapping[skeleton.Depth, int]) -> Traced:
        small = skeleton.cut(config, dict(counts))
        setting = sizes.key(request, (scores, sorted((d.part, d.key, n) for d, n in counts.items())))

        def real() -> tuple[Timeline, dict[str, int]]:
            model, adapter = adapted(small, kind, request, dtype)
            if request.mode == "train" or scores:
                model.config.use_cache = False  # type: ignore[union-attr]  # as the Trainer does for a run
            made = trace(model, adapter, request, scores)
            return made.timeline, made.operations

        if quick:
            line, operations = sizes.line(setting, request.batch_size, request.length, real)
        else:
            line, operations = real()
            sizes.remember(setting, request.batch_size, request.length, line, operations)
        return described(line, small, operations)

    if shared:
        if found := repeat.told(run, base):
            return found
        base = {}
    first = run(base)
    total: Parts = {phase: dict(parts) for phase, parts in first.parts.items()}
    operations = float(sum(first.operations.values()))
    for depth, few in base.items():
        more = run(base | {depth: few + depth.period})
        times = (depth.count - few) / depth.period
        for phase, parts in more.parts.items():
            for part, value in parts.items():
                total[phase][part] += times * (value - first.parts[phase][part])
        operations += times * (sum(more.operations.values()) - sum(first.operations.values()))
    return total, operations


def _cuttable(config: Any, request: Request) -> list[skeleton.Depth]:
    """Return the stacks to trace with fewer layers: those that are deep enough, unless the request names layers."""
    chosen = str(request.method.fields)
    if "layers" in request.method.fields or "@" in chosen or re.search(r"\.\d+\.", chosen):
        return []
    return [d for d in skeleton.depths(config) if d.count > 2 * d.period + 1]


def model_of(request: Request) -> tuple[Any, Any]:
    """Return the config, changed as the request says, and the class of the model that it names."""
    return read(request.model, request.task, request.labels, json.dumps(request.config, default=str))


def form_of(request: Request) -> str:
    """Return the form that the base is kept in, see `formulas.packed_form`."""
    return formulas.packed_form(model_of(request)[0], request)


@lru_cache(maxsize=8)
def read(model: str, task: str | None, labels: int, changes: str = "{}") -> tuple[Any, Any]:
    """Return the config of a model with changes, as JSON, and the class for a task."""
    config = changed(skeleton.read_config(model), json.loads(changes))
    kind = skeleton.model_class(config, task)
    if kind.__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
        config.num_labels = labels
        if getattr(config, "pad_token_id", None) is None:  # without one they take no batch, so training sets one
            config.pad_token_id = 0
    return config, kind


def _apart(request: Request) -> str:
    """Return what the full model's own figures depend on, as the text of a request."""
    return request.bare.model_copy(update=_APART).model_dump_json()


def check_room(request: Request) -> None:
    """Raise ConfigError if a request's text and what its method puts in front of it need too many positions."""
    if request.peft:
        return
    made = request.new_tokens if request.mode == "generate" else 0
    for room in _whole(_apart(request)).rooms:
        text = {"encoder": request.length, "decoder": made or request.length}
        count = text.get(room.tower, request.length + made)
        if count + room.front > room.most:
            raise ConfigError(
                f"{count} tokens and {room.front} virtual ones or prefix slots of {request.method.name} need "
                f"{count + room.front} positions; the model has {room.most}.",
                f"Ask for {max(room.most - room.front, 0)} tokens at most, or for a shorter prompt or prefix.",
            )


def positions(request: Request) -> int:
    """Return the most tokens that the model of a request takes per row, from its config."""
    config, kind = model_of(request)
    small = skeleton.build(skeleton.cut(config, dict.fromkeys(skeleton.depths(config), 1)), kind)
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20
    front = 0 if request.peft else max([r.front for r in _whole(_apart(request)).rooms], default=0)
    return min(int(most), position_table(small) or int(most)) - front


@lru_cache(maxsize=128)
def _whole(text: str) -> Whole:
    """Count weights, adapter, gradients and optimizer state on the full model."""
    request = Request.model_validate_json(text)
    config, kind = model_of(request)
    dtype = formulas.dtype_of(config, request.dtype)
    model, adapter = adapted(config, kind, request, dtype)
    mine = {id(p) for p in adapter.parameters()}
    trained = [p for p in adapter.parameters() if p.requires_grad]
    base = [p for p in model.parameters() if id(p) not in mine]
    plain, packed = formulas.packed_bytes(config, request, model)
    weights = formulas.size(base) - plain + packed
    buffers = {id(b): b for b in model.buffers()}.values()
    training = request.mode == "train"
    parts = {"weights": weights, "adapter": formulas.size([*adapter.parameters(), *buffers])}
    parts["optimizer"], scratch = _optimizer(adapter, trained, request) if training else (0, 0)
    counts = sum(p.numel() for p in trained), sum(p.numel() for p in base), len(adapter.deltas), _shares(adapter)
    layer, rooms = _largest_layer(model), tuple(adapter.graft.rooms((adapter.name,)))
    slots = _slots(model, config, request, dtype) if request.mode == "generate" else ()
    return Whole(
        type(model).__name__, parts, scratch, layer, formulas.size(trained) if training else 0, *counts, slots, rooms,
        layers.sizes(adapter) if form_of(request) == "none" else None,
    )  # fmt: skip


def _optimizer(adapter: Adapter, trained: list[nn.Parameter], request: Request) -> tuple[int, int]:
    """Return the bytes of the optimizer's state, and those that a step takes and releases."""
    own = adapter.optimizer()
    if own is None:
        kind = request.optimizer
        return kept.optimizer_state(trained, kind), kept.optimizer_scratch(trained, kind, request.device)
    if request.optimizer != DEFAULT:
        what = f"{request.method.name} has an optimizer of its own, but optimizer={request.optimizer} asks for another."
        raise ConfigError(what, "Leave the optimizer out.")
    return kept.own_step(own, trained)


def _slots(model: nn.Module, config: Any, request: Request, dtype: torch.dtype) -> caches.Slots:
    """Return the layers of the cache: the model's own, or a guess if it cannot run without values."""
    if supported():
        with contextlib.suppress(Exception):
            return caches.asked(model, request)
    return caches.guessed(config, dtype.itemsize)


def _shares(adapter: Adapter) -> bool:
    """Return whether layers share trained tensors, whose memory then does not grow with depth."""
    held = [id(p) for delta in adapter.deltas.values() for p in delta.parameters() if p.requires_grad]
    return len(held) > len(set(held))


def _largest_layer(model: nn.Module) -> int:
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return max((formulas.size(layer.parameters()) for stack in stacks for layer in stack), default=0)


def _with(whole: Whole, parts: Mapping[str, float], request: Request, phase: str) -> dict[str, int]:
    """Return all parts of a phase: what was traced and the weights, after sharding."""
    out = dict.fromkeys(PARTS, 0) | whole.parts
    for part, value in parts.items():
        out[part] += formulas.rounded(max(value, 0))
    if form_of(request) != "none" and phase != "step":  # a layer's weight is read through a dense copy of it
        out["temporaries"] += whole.layer // 4
    cut, layer = whole.divided or (None, whole.layer)
    return formulas.sharded(out, request, layer if phase != "step" else 0, whole.gradients, cut)


def _generation(config: Any, whole: Whole, request: Request, dtype: torch.dtype) -> dict[str, int]:
    """Return the parts while the last token is generated: the whole cache, and the growing copy of one layer."""
    held = caches.sizes(whole.slots, request)
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    logits = request.batch_size * vocabulary * (dtype.itemsize + 4)
    parts = {"activations": sum(held), "temporaries": max(held, default=0), "logits": logits}
    return _with(whole, parts, request, "generation")


def rough(config: Any, request: Request, dtype: torch.dtype, gradients: int, why: str) -> Parts:
    """Return phase -> part -> bytes by a rule of thumb: 34 bytes an activation of a layer (arXiv 2205.05198, eq. 2).

    `why` says why it was not traced.
    """
    text = config.get_text_config()
    width = int(getattr(text, "hidden_size", 0) or 0)
    layers = sum(d.count for d in skeleton.depths(config)) or 1
    if not width:
        what = (
            f"The model's code cannot be traced ({why}), and {type(config).__name__} states no width to estimate from."
        )
        raise ConfigError(what, "Plan a class with a loss and inputs of a size that it takes (image_size, max_length).")
    rows = request.batch_size * request.length * width
    kept = rows * dtype.itemsize * (layers if request.gradient_checkpointing else 17 * layers)
    vocabulary = int(getattr(text, "vocab_size", 0) or 0)
    logits = request.batch_size * request.length * vocabulary * (dtype.itemsize + 8)
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
    """Put the plan together; `held`: what a replay of the allocator found, if there was one."""
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
        notes.append(f"a CUDA process takes about {CONTEXT >> 20} MiB more for its context")
    else:
        notes.append("with glibc, MALLOC_MMAP_THRESHOLD_=131072 in the environment keeps a process near the low figure")
    notes += request.left_out
    if request.shard == "fsdp" and form_of(request) != "none":
        notes.append("`peftree train` does not shard a quantised base")
    return Plan(
        request, whole.model, low, expected, high, phase, totals, {k: v for k, v in phases[phase].items() if v},
        whole.trainable, whole.total, whole.sites, operations, how, tuple(notes),
    )  # fmt: skip


def reserved(low: int, still: int) -> int:
    """Return what CUDA's caching allocator reserves for a peak of `low` bytes, `still` of which never move.

    It adds the workspaces of two threads, and a share for rounding and fragments: the median of the public runs that
    `docs/plan-truth-public.md` holds (2 to 17 %; full fine-tuning, whose optimizer makes large lists, has most).
    """
    return low + 2 * WORKSPACE + round(FRAGMENTS * max(low - still, 0))


def resident(low: int, still: int) -> int:
    """Return what a process has resident at a peak of `low` bytes, `still` of which never move.

    glibc keeps freed memory for later, in pieces that later tensors do not fit: one share for all methods, the mean of
    the real runs that `docs/plan-truth.md` holds (3 to 38 %).
    """
    return low + round(MALLOC * max(low - still, 0))
