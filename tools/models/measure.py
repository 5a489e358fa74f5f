"""What works on one model: each cell is one thing tried, and says `works` or what came in between."""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from tools.models.inputs import Batch
from torch import Tensor, nn

import peftree
from peftree.adapter import Adapter
from peftree.errors import PeftreeError

WORKS, NONE = "works", "-"
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-9}  # largest difference over the largest value
GRADIENT = {torch.float32: (1e-2, 1e-7), torch.float64: (1e-6, 1e-12)}  # relative and absolute, in norm
CELLS = ("linear", "attention", "prefix", "tokens", "side", "merge", "plan")


class Subject:
    """A bare model with inputs that it takes."""

    def __init__(self, model: nn.Module, batch: Batch | Callable[[nn.Module], Any]) -> None:
        # torch's attention takes another kernel, with other last bits, where weights are frozen: an adapted base is.
        self.model, self.batch = model.requires_grad_(False), batch
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.base = self.run(model)

    def run(self, model: nn.Module) -> list[Tensor]:
        """Return every floating output of the model, in order."""
        torch.manual_seed(7)
        with torch.no_grad():
            return list(floats(call(model, self.batch)))

    def fresh(self) -> nn.Module:
        """Return a copy of the bare model."""
        return copy.deepcopy(self.model)

    def exact(self) -> Subject:
        """Return the same model with the same inputs in float64."""
        if callable(self.batch):
            raise TypeError("these inputs are of one dtype")
        wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in self.batch.items()}
        return Subject(self.fresh().double(), wide)


class WrongError(Exception):
    """A result is not what the dense formula, the bare model or autograd gives."""


class IdleError(Exception):
    """The bare model's output stays the same when the weights in question change: there is nothing to adapt."""


def call(model: nn.Module, batch: Batch | Callable[[nn.Module], Any]) -> Any:
    """Run the model on copies of the inputs, without a cache; or as a function of the model does."""
    if callable(batch):
        return batch(model)
    takes = inspect.signature(type(model).forward).parameters
    more = {"use_cache": False} if "use_cache" in takes else {}
    return model(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}, **more)


def floats(out: Any) -> Iterator[Tensor]:
    """Yield the floating tensors in a model's output, in order."""
    if isinstance(out, Tensor):
        if out.is_floating_point() and out.numel():
            yield out
    elif isinstance(out, dict):
        for value in out.values():
            yield from floats(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from floats(value)


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference over the largest value, over all outputs."""
    if [t.shape for t in a] != [t.shape for t in b]:  # as where a model itself decides how long its output is
        return float("inf")
    finite = [(x.detach().nan_to_num(0, 0, 0), y.detach().nan_to_num(0, 0, 0)) for x, y in zip(a, b, strict=True)]
    return max((float((x - y).abs().max() / y.abs().max().clamp_min(1e-12)) for x, y in finite), default=0.0)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether two outputs are equal to the bit."""
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def noise(adapter: Adapter, size: float = 0.05) -> None:
    """Move every tensor of an adapter off its start."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=size)


def cell(check: Callable[[], str | None]) -> str:
    """Return what a check says: works, refused with our own words, wrong, or a crash with the raw error."""
    try:
        return check() or WORKS
    except PeftreeError as error:
        return "refused: " + _short(error.what)
    except WrongError as error:
        return "wrong: " + _short(str(error))
    except IdleError as error:
        return f"{NONE}: {error}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {_short(str(error))}{_place(error)}"


def _short(text: str) -> str:
    line = re.sub(r"/\S+/(?=\S)", ".../", " ".join(text.split()))  # no path of this machine
    return line if len(line) <= 150 else line[:147] + "..."


def _place(error: BaseException) -> str:
    """Return the innermost of our own lines on the way to an error."""
    found, trace = "", error.__traceback__
    while trace:
        name = trace.tb_frame.f_code.co_filename
        if "/src/peftree/" in name:
            found = f" ({name.split('/src/peftree/')[1]}:{trace.tb_frame.f_code.co_name})"
        trace = trace.tb_next
    return found


def lora(subject: Subject, sites: str, merging: bool = False) -> str | None:
    """LoRA at `sites`: off is the base, on is the dense formula, gradients are the chain rule's; or merging.

    Where a model magnifies rounding (it takes the largest few of many scores, or is deep), two right ways to compute
    differ by more than any bound in float32. What is wrong in float32 is wrong only if it is in float64 too, where the
    bound is 100,000 times closer.
    """
    try:
        return _lora(subject, sites, merging)
    except WrongError as error:
        try:
            return _lora(subject.exact(), sites, merging)
        except (RuntimeError, TypeError):
            raise error from None  # the model does not run in float64


def _lora(subject: Subject, sites: str, merging: bool) -> str | None:
    model = subject.fresh()
    dense = subject.fresh()
    adapter = peftree.adapt(model, "lora", sites=sites, r=4, head=False)
    noise(adapter)
    if merging:
        return _merging(subject, model)
    with peftree.disabled(model):
        if not same(subject.run(model), subject.base):
            raise WrongError("switched off it is not the base to the bit")
    weights = [_written(dense, *entry[1:]) for entry in adapter.entries]
    torch.manual_seed(7)
    ours = list(floats(call(model, subject.batch)))
    torch.manual_seed(7)
    theirs = list(floats(call(dense, subject.batch)))
    found, effect = gap(ours, theirs), gap(theirs, subject.base)
    if effect == found == 0:
        raise IdleError("the bare model's output stays the same when these weights change")
    small = min(effect * 1e-3, 1e-2) if subject.dtype == torch.float32 else 0.0
    if found > max(CLOSE[subject.dtype], small):
        raise WrongError(f"the output is {found:.1e} from that of dense weights, whose effect is {effect:.1e}")
    return _gradients(adapter, ours, theirs, weights, *GRADIENT[subject.dtype])


def _written(dense: nn.Module, site: Any, delta: Any) -> Callable[[], Tensor | None]:
    """Write `W + scale * B A` into the bare copy; return a reader of the gradient of that part of the weight."""
    module = dense.get_submodule(site.path)
    A, B = delta.A.detach(), delta.B.detach()
    change = delta.scale * torch.einsum("...ro,...ri->...oi", B, A)
    W = module._parameters[site.parameter]
    assert W is not None
    turned = site.kind in ("conv1d", "embedding") or site.split == "out"
    rows = slice(*site.rows) if site.rows else slice(None)

    def matrix(tensor: Tensor) -> Tensor:
        flat = tensor.flatten(1) if site.kind == "conv" or site.split else tensor
        return (flat.t() if turned else flat)[..., rows, :]

    new = W.detach().clone()
    view = matrix(new)
    view += change
    module._parameters[site.parameter] = nn.Parameter(new)

    def gradient() -> Tensor | None:
        found = module._parameters[site.parameter]
        return None if found is None or found.grad is None else matrix(found.grad)

    return gradient


def _loss(outputs: list[Tensor]) -> Tensor:
    """Return the sum of the outputs' mean squares."""
    return torch.stack([t.double().nan_to_num().pow(2).mean() for t in outputs if t.requires_grad]).sum()


def _gradients(
    adapter: Adapter,
    ours: list[Tensor],
    theirs: list[Tensor],
    weights: list[Callable[[], Tensor | None]],
    relative: float,
    absolute: float,
) -> str | None:
    """Compare the gradients of the factors with those that the chain rule gives from the dense weights'."""
    if not any(t.requires_grad for t in theirs):
        return None  # a model that runs without a graph
    for outputs in (ours, theirs):
        _loss(outputs).backward()
    idle = 0
    for (key, _, entry), read in zip(adapter.entries, weights, strict=True):
        delta: Any = entry
        dense, A, B = read(), delta.A, delta.B
        if dense is None:
            idle += 1
            continue
        s = delta.scale
        pairs = (
            (A, s * torch.einsum("...ro,...oi->...ri", B, dense)),
            (B, s * torch.einsum("...ri,...oi->...ro", A, dense)),
        )
        for tensor, right in pairs:
            if tensor.grad is None or not tensor.grad.isfinite().all():
                raise WrongError(f"{key} has no finite gradient")
            if (tensor.grad - right).norm() > relative * right.norm() + absolute:
                raise WrongError(f"the gradient of {key} is not the chain rule's")
    if idle == len(weights):
        raise WrongError("no adapted module has a gradient")
    return None


def _merging(subject: Subject, model: nn.Module) -> str | None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    on = subject.run(model)
    peftree.merge(model)
    found = gap(subject.run(model), on)
    if found > CLOSE[subject.dtype]:
        raise WrongError(f"the merged output is {found:.1e} from the unmerged one")
    peftree.unmerge(model)
    after = model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[k], after[k]) for k in before):
        raise WrongError("unmerging does not give the weights back to the bit")
    return None


def effect(subject: Subject, method: str, **fields: Any) -> str | None:
    """Another method: off is the base, on has the base's shapes and other values, gradients are finite."""
    model = subject.fresh()
    adapter = peftree.adapt(model, method, head=False, **fields)
    noise(adapter, 0.3)
    with peftree.disabled(model):
        if not same(subject.run(model), subject.base):
            raise WrongError("switched off it is not the base to the bit")
    torch.manual_seed(7)
    out = call(model, subject.batch)
    ours = list(floats(out))
    if gap([t.detach() for t in _text(out, ours, subject.base, fields.get("length", 0))], subject.base) == 0:
        raise WrongError("the output is that of the base")
    if any(t.requires_grad for t in ours):
        _loss(ours).backward()
        bad = [
            k
            for k, d in adapter.deltas.items()
            for p in d.parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        if bad or all(p.grad is None for p in adapter.parameters()):
            raise WrongError(f"no finite gradient: {', '.join(bad[:2]) or 'anywhere'}")
    return None


def _text(out: Any, ours: list[Tensor], base: list[Tensor], slots: int) -> list[Tensor]:
    """Return outputs without what belongs to the slots: columns of attention maps, and what a decoder looks at.

    The encoder's output of an encoder-decoder holds virtual tokens, as the decoder of a later call needs them.
    """
    states = getattr(out, "encoder_last_hidden_state", None)
    found = []
    for x, y in zip(ours, base, strict=False):
        if x.dim() == 4 and (*x.shape[:3], x.shape[3] - slots) == y.shape:
            x = x[..., slots:]
        elif x is states and x.dim() == 3 and (x.shape[0], x.shape[1] - slots, x.shape[2]) == y.shape:
            x = x[:, slots:]
        found.append(x)
    return found + ours[len(found) :]


def attention(subject: Subject) -> str | None:
    """LoRA on the query and value maps, or on the maps that hold them fused."""
    first: PeftreeError | None = None
    for sites in ("attn.q attn.v", "attn.qkv", "attn.q attn.kv", "attn.q attn.k"):
        try:
            peftree.adapt(subject.fresh(), "lora", sites=sites, head=False)
        except PeftreeError as error:
            first = first or error
        else:
            return lora(subject, sites)
    assert first is not None
    raise first


def has_linear(model: nn.Module) -> bool:
    """Return whether there is a linear map that is not a head: a network of convolutions has none."""
    heads = {"classifier", "head", "fc", "score", "lm_head"}
    named = [n for n, m in model.named_modules() if type(m).__name__ == "Conv1D" or _maps(m)]
    return any(not heads & {*n.split(".")} for n in named)


def _maps(module: nn.Module) -> bool:
    """Return whether a module has one matrix, of the sizes that it states."""
    weight, own = module._parameters.get("weight"), vars(module)
    return weight is not None and weight.shape == (own.get("out_features"), own.get("in_features"))


def has_attention(model: nn.Module) -> bool:
    """Return whether any module is called an attention and has more than one map: with one map it is a gate."""
    called = (m for m in model.modules() if re.search(r"attention|attn", type(m).__name__, re.IGNORECASE))
    return any(sum(p.ndim > 1 for p in m.parameters()) > 1 for m in called)


def through_interface(model: nn.Module) -> bool:
    """Return whether an attention of the model calls transformers' attention interface."""
    return any(
        "ALL_ATTENTION_FUNCTIONS" in part.__code__.co_names
        for module in model.modules()
        for part in (type(module).forward, getattr(type(module).forward, "__wrapped__", None))
        if isinstance(part, FunctionType)
    )


def planned(config: Any, name: str, sites: str, batch: Any) -> str | None:
    """A plan of LoRA at `sites`, from the config alone, traced."""
    from peftree import plan

    config = copy.deepcopy(config)
    config.architectures = [name]
    pixels = batch.get("pixel_values")
    side = pixels.shape[-1] if pixels is not None and pixels.ndim == 4 else None
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        asked = plan.request(
            model=folder,
            method={"name": "lora", "sites": sites},
            batch_size=2,
            max_length=16,
            image_size=side,
            device="cpu",
        )
        made = plan.plan(asked)
    return None if made.how == "traced" else f"rough: {_short(next(n for n in made.notes if 'not traced' in n))}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings of the libraries off the screen."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        yield


def cells(subject: Subject, config: Any, name: str, wanted: tuple[str, ...] = CELLS) -> Iterator[tuple[str, str]]:
    """Yield each cell of a model by name, in the order of CELLS."""
    attends, maps = has_attention(subject.model), has_linear(subject.model)
    checks: dict[str, Callable[[], str | None]] = {
        "linear": lambda: lora(subject, "linear") if maps else NONE,
        "attention": lambda: attention(subject) if attends else NONE,
        "prefix": lambda: effect(subject, "prefix_tuning", length=3) if attends else NONE,
        "tokens": lambda: effect(subject, "prompt_tuning", length=3),
        "side": lambda: effect(subject, "lst", reduction=4),
        "merge": lambda: lora(subject, "linear", merging=True) if maps else NONE,
        "plan": lambda: planned(
            getattr(subject.model, "config", config), name, "linear" if maps else "conv", subject.batch
        ),
    }
    for key in wanted:
        yield key, cell(checks[key])
