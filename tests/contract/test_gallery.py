"""A gallery of broken methods: each check is shown to bite, by a method that breaks just what it guards."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn import functional

from contract.checks import CHECKS, Case
from contract.readers import READERS, Reader
from peftree import registry
from peftree.deltas import Frozen, LowRank, lora_factors
from peftree.errors import PeftreeError
from peftree.methods.contract import Deltas, Field, Method, Moment, Place, Site, Tags, trainable
from sampled import quick

TAGS = Tags("reparameterized", "none", identity_at_init=True, mergeable=True, lr=1e-3)
COUNTER = itertools.count()
GLOBAL = nn.Parameter(torch.zeros(1))


class Sound(Method):
    """A plain low-rank method that passes every check: the others are this one with one fault."""

    name: ClassVar[str] = "sound"
    tags: ClassVar[Tags] = TAGS
    sites: str = Field("attn.q attn.v", description="where")
    r: int = Field(2, ge=1, description="rank")

    def count(self, sites: Sequence[Site]) -> int:
        return sum(s.experts * self.r * (s.in_features + s.out_features) for s in sites)

    def build(self, place: Place) -> LowRank:
        return SoundDelta(place, *lora_factors(place, self.r), 1.0)


class SoundDelta(LowRank):
    """The sound delta; `plain` is off so that `fast` always runs."""

    @property
    def plain(self) -> bool:
        return False


def broken(check: str, **members: Any) -> type[Method]:
    """Return a method whose delta has these members instead."""
    delta = type(f"Delta_{check}", (SoundDelta,), members)

    def build(self: Any, place: Place) -> LowRank:
        return delta(place, *lora_factors(place, self.r), 1.0)

    return _method(check, build)


def _method(check: str, build: Callable[[Any, Place], Any], tags: Tags = TAGS, **more: Any) -> type[Method]:
    body = {"build": build, "name": f"broken_{check}", "tags": tags, "__module__": __name__, **more}
    body["__annotations__"] = {"name": ClassVar[str], "tags": ClassVar[Tags]} | more.pop("__annotations__", {})
    return type(f"Broken_{check}", (Sound,), body)


def writes_base(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    if self.training:
        with torch.no_grad():
            frozen.weight.data.add_(1e-3)  # behind the back of the version counter
    return LowRank.fast(self, x, y, frozen)


def starts_elsewhere(self: Any, place: Place) -> LowRank:
    return SoundDelta(place, place.kaiming(2, place.site.in_features), place.normal(2, place.site.out_features), 1.0)


def reads_values(self: Any, place: Place) -> LowRank:
    rank = 2 if place.abstract else 3
    return SoundDelta(place, *lora_factors(place, rank), 1.0)


class _Frozen(torch.autograd.Function):
    """Identity whose gradient has the wrong sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


def both_zero(self: Any, place: Place) -> LowRank:
    n, m = place.site.in_features, place.site.out_features
    delta = SoundDelta(place, place.zeros(2, n), place.zeros(2, m), 1.0)
    delta.stray = place.zeros(3)
    return delta


def wrong_way(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    change = LowRank.fast(self, x, torch.zeros_like(y), frozen)
    return y + 30 * _Frozen.apply(change)


def hidden_state(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.register_buffer("secret", torch.full((1,), float(next(COUNTER))), persistent=False)
    delta.__class__ = _Secret
    return delta


class _Secret(SoundDelta):
    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        return super().fast(x, y, frozen) * (1 + self.secret.to(y.dtype) * 1e-2)


def hooks_module(self: Any, place: Place) -> LowRank:
    place.module.register_forward_hook(lambda m, a, y: y + 1e-3)
    return SoundDelta(place, *lora_factors(place, 2), 1.0)


def leaves_buffer(self: Any, place: Place) -> LowRank:
    place.module.register_buffer("left_behind", torch.zeros(1))
    return SoundDelta(place, *lora_factors(place, 2), 1.0)


def shares_globally(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.everyone = GLOBAL
    delta.__class__ = _Global
    return delta


class _Global(SoundDelta):
    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        return super().fast(x, y, frozen) + self.everyone.to(y.dtype)


def draws_elsewhere(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.A.data += float(next(COUNTER))
    return delta


def by_position(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    place = torch.arange(x.shape[1], device=x.device, dtype=y.dtype)[None, :, None]
    return LowRank.fast(self, x, y, frozen) * (1 + place)


def counts_calls(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    self.scale = self.scale + 0.1 * self.training
    return LowRank.fast(self, x, y, frozen)


def holds_lock(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.lock = threading.Lock()
    return delta


def reads_number(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return LowRank.fast(self, x, y, frozen) * (1.0 if y.sum().item() > -1e30 else 2.0)


def mixes_rows(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return LowRank.fast(self, x, y, frozen) + 0.1 * x.mean() * self.B.sum()


def scaled(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return y + 1.5 * (LowRank.fast(self, x, y, frozen) - y)


def no_groups(self: Any, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
    return [{"params": [p for d in deltas.values() for p in d.parameters()][:1], "lr": lr}]


def own_rate(self: Any, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
    return [{"params": trainable(deltas.values()), "lr": 1e-3}]


def holds_a_tensor(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.mean = torch.zeros(3)
    return delta


def writes_an_attribute(self: Any, place: Place) -> LowRank:
    place.module.scale_was = 1.0
    return SoundDelta(place, *lora_factors(place, 2), 1.0)


def reads_the_weight(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return LowRank.fast(self, x, y, frozen) * (1 + 0 * frozen.weight.mean())


def counts_steps(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.__class__ = _Counting
    return delta


class _Counting(SoundDelta):
    steps: int = 0

    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        return super().fast(x, y, frozen) * (1 + 0.1 * self.steps)

    def weight(self, W: Tensor) -> Tensor:
        return W + (super().weight(W) - W) * (1 + 0.1 * self.steps)


def counted_up(self: Any, deltas: Deltas, moment: Moment) -> None:
    for delta in deltas.values():
        if isinstance(delta, _Counting):
            delta.steps = moment.step


def halved(self: Any, deltas: Deltas) -> None:
    for delta in deltas.values():
        if isinstance(delta, SoundDelta):
            delta.A.data *= 0.5


def cut(self: Any, deltas: Deltas) -> None:
    for delta in deltas.values():
        if isinstance(delta, SoundDelta):
            delta.A, delta.B = (nn.Parameter(torch.cat([t, torch.zeros_like(t)])) for t in (delta.A, delta.B))


def runs_away(self: Any, deltas: Deltas, moment: Moment) -> Tensor | None:
    total = sum((p.sum() for d in deltas.values() for p in d.parameters()), torch.zeros(()))
    return total * (float("inf") if moment.step else 1.0)


def doubled_in_training(self: Any, W: Tensor) -> Tensor:
    return W + (2 if self.training else 1) * (LowRank.weight(self, W) - W)


def lost_in_half(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return y if y.dtype == torch.bfloat16 else LowRank.fast(self, x, y, frozen)


def other_when_compiled(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    scale = 2.0 if torch.compiler.is_compiling() else 1.0
    return y + scale * (LowRank.fast(self, x, y.clone(), frozen) - y)


def detaches_input(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return LowRank.fast(self, x.detach(), y, frozen)


def keeps_the_first(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    """A cache of the factors in evaluation that nothing clears."""
    A, B = self.factors()
    if not self.training and not torch.is_grad_enabled():
        A, B = vars(self).setdefault("kept", [A.detach().clone(), B.detach().clone()])
    return y + functional.linear(functional.linear(x, A.to(x.dtype)), B.t().to(x.dtype))


SEEN_BEFORE: dict[str, Tensor] = {}


def remembers(self: Any, deltas: Deltas, moment: Moment) -> None:
    for delta in deltas.values():
        if isinstance(delta, SoundDelta):
            before = SEEN_BEFORE.get("B", torch.zeros(1))
            SEEN_BEFORE["B"] = 0.9 * before.mean() + delta.B.detach().abs().mean() + 0.1
            delta.B.data += 1e-2 * before.mean()


def adds_up(self: Any, deltas: Deltas, moment: Moment) -> Tensor | None:
    """A term that grows with every pass, whether a step follows or not."""
    return (1 + next(COUNTER)) * sum((p.square().sum() for p in trainable(deltas.values())), torch.zeros(()))


def on_the_cpu(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.register_buffer("order", torch.arange(2))
    return delta


def one_generator(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    if not place.abstract:
        delta.A.data.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    return delta


def seeds_torch(self: Any, place: Place) -> LowRank:
    torch.manual_seed(0)
    return SoundDelta(place, *lora_factors(place, 2), 1.0)


def in_float32(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.A.data, delta.B.data = delta.A.data.float(), delta.B.data.float()
    return delta


def copies_the_base(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.register_buffer("start", place.frozen.weight.detach().clone())
    return delta


def keeps_in_a_table(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, 2), 1.0)
    delta.means = {"x": torch.zeros(3)}
    return delta


def thaws(self: Any, deltas: Deltas, moment: Moment) -> None:
    for delta in deltas.values():
        if isinstance(delta, SoundDelta):
            delta.register_parameter("more", nn.Parameter(torch.zeros(1)))


def more_beside_another(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    """Right alone: its change grows with what the adapter before it made of the frozen map's output."""
    there = (y - functional.linear(x, frozen.weight, frozen.bias)).abs().max()
    return y + (1 + 1e3 * there) * (LowRank.fast(self, x, y, frozen) - y)


def by_default_rank(self: Any, sites: Sequence[Site]) -> int:
    return sum(2 * (s.in_features + s.out_features) for s in sites)


def without_experts(self: Any, sites: Sequence[Site]) -> int:
    return sum(self.r * (s.in_features + s.out_features) for s in sites)


def swapped(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, self.r), 1.0)
    delta.scale = 2.0 if place.site.kind == "conv1d" else 1.0
    delta.__class__ = _Transposed
    return delta


class _Transposed(SoundDelta):
    def weight(self, W: Tensor) -> Tensor:
        return W + (super().weight(W) - W) / self.scale


def drops_always(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return y + functional.dropout(LowRank.fast(self, x, y, frozen) - y, self.loss)


def drops(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, self.r), 1.0)
    delta.loss = self.dropout
    delta.__class__ = _Dropped
    return delta


class _Dropped(SoundDelta):
    fast = drops_always


def with_dropout(kept: Callable[[Tensor, float], Tensor]) -> Callable[[Any, Place], LowRank]:
    """Build a delta that drops entries of its input in training by `kept`."""

    class Dropping(SoundDelta):
        def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
            return y + LowRank.fast(self, kept(x, self.share) if self.training else x, torch.zeros_like(y), frozen)

    def build(self: Any, place: Place) -> LowRank:
        delta = Dropping(place, *lora_factors(place, self.r), 1.0)
        delta.share = self.dropout
        return delta

    return build


def unscaled(x: Tensor, share: float) -> Tensor:
    return x * (torch.rand_like(x) >= share)


def scaled_twice(x: Tensor, share: float) -> Tensor:
    return functional.dropout(x, share) / (1 - share)


def ends_of(count: int) -> Callable[[Any, Deltas, Moment], None]:
    """A schedule that does something after `count` steps: a value that no tensor holds, or one that is not finite."""

    def schedule(self: Any, deltas: Deltas, moment: Moment) -> None:
        for delta in deltas.values():
            if isinstance(delta, SoundDelta) and moment.step == count:
                delta.scale = 3.0

    return schedule


def warms_up(self: Any, deltas: Deltas, moment: Moment) -> None:
    """A mean of the steps so far, in an attribute, that training uses and a checkpoint does not hold."""
    for delta in deltas.values():
        if isinstance(delta, SoundDelta) and not moment.start:
            mean = 0.9 * vars(delta).get("mean", 0.0) + 0.1 * float(delta.B.detach().abs().mean())
            delta.mean = mean
            delta.B.data.mul_(1 - mean)


def keeps_passes(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    out = LowRank.fast(self, x, y, frozen)
    vars(self).setdefault("outputs", []).extend([out] if out.requires_grad else [])
    return out


def views(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return y + LowRank.fast(self, x.view(-1, x.shape[-1]), torch.zeros_like(y).view(-1, y.shape[-1]), frozen).view(
        y.shape
    )


TAPS: list[Tensor] = []


def taps(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    TAPS.append(y.detach())
    return LowRank.fast(self, x, y, frozen)


def by_hash(self: Any, place: Place) -> LowRank:
    """A projection that each process draws for itself and not saved."""
    delta = SoundDelta(place, *lora_factors(place, self.r), 1.0)
    draw = torch.Generator().manual_seed(hash(place.site.path) % 2**31)
    basis = torch.eye(self.r) if place.abstract else torch.randn(self.r, self.r, generator=draw)
    delta.register_buffer("basis", basis.to(delta.A), persistent=False)
    delta.__class__ = _Projected
    return delta


class _Projected(SoundDelta):
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.basis @ self.A, self.B


class Hashed(Sound):
    name = "broken_elsewhere"
    build = by_hash


class OwnRate(torch.optim.SGD):
    """Keeps the rate that it was made with."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self.rate = groups[0]["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(self.rate * p.grad)


def more_in_training(self: Any, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
    return y + (1.5 if self.training else 1.0) * (LowRank.fast(self, x, y, frozen) - y)


def drops_the_base(self: Any, place: Place) -> LowRank:
    delta = SoundDelta(place, *lora_factors(place, self.r), 1.0)
    delta.share = self.dropout
    delta.__class__ = _OnTheBase
    return delta


class _OnTheBase(SoundDelta):
    def fast(self, x: Tensor, y: Tensor, frozen: Frozen) -> Tensor:
        return super().fast(x, functional.dropout(y, self.share, self.training), frozen)


def with_a_gradient(self: Any, deltas: Deltas, batches: Any) -> None:
    for batch in batches:
        batch().backward()


def shared_scale(self: Any, place: Place) -> LowRank:
    """What the class keeps is of the adapter that was made last."""
    _Shared.factor = self.scale
    delta = SoundDelta(place, *lora_factors(place, self.r), 1.0)
    delta.__class__ = _Shared
    return delta


class _Shared(SoundDelta):
    factor: float = 1.0

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.factor, self.B


def merged_before(self: Any, W: Tensor) -> Tensor:
    """Keeps its term from the first call in evaluation."""
    if self.training or torch.is_grad_enabled():
        return LowRank.weight(self, W)
    return W + vars(self).setdefault("term", [LowRank.weight(self, W) - W])[0]


def halved_at_other_ranks(self: Any, deltas: Deltas) -> None:
    for delta in deltas.values():
        if isinstance(delta, SoundDelta) and self.r != 2:
            delta.A.data *= 0.5


def no_gradient(self: Any, deltas: Deltas, moment: Moment) -> Tensor:
    return self.warmth * sum((p.square().sum() for p in trainable(deltas.values())), torch.zeros(())).detach()


DROPOUT = {"dropout": Field(0.0, ge=0, lt=1, description="share"), "__annotations__": {"dropout": float}}
SCALE = {"scale": Field(1.0, gt=0, description="factor"), "__annotations__": {"scale": float}}
IDLE = {"warmth": Field(0.5, ge=0, lt=1, description="nothing"), "__annotations__": {"warmth": float}}
COMPILED = ("compiles", "compiled_passes")  # several seconds each, in the slow run
LONG = (*COMPILED, "elsewhere", "effects")
GALLERY: list[tuple[str, type[Method]]] = [
    ("frozen_base", broken("frozen_base", fast=writes_base)),
    ("identity", _method("identity", starts_elsewhere)),
    ("identity", _method("identity_tag", Sound.build, Tags("reparameterized", "none", False, True, lr=1e-3))),
    ("counted", _method("counted", reads_values)),
    ("counted", _method("groups", Sound.build, param_groups=no_groups)),
    ("counted", _method("own_rate", Sound.build, param_groups=own_rate)),
    ("counted", _method("miscounted", Sound.build, count=lambda self, sites: 1000 * len(sites))),
    ("alive", _method("alive", both_zero)),
    ("learns", broken("learns", fast=wrong_way)),
    ("round_trip", _method("round_trip", hidden_state)),
    ("off", _method("off", hooks_module)),
    ("merges", broken("merges", fast=scaled)),
    ("merges", _method("merges_tag", Sound.build, Tags("reparameterized", "none", True, False, lr=1e-3))),
    ("combines_to_itself", _method("combines", hidden_state)),
    ("detaches", _method("detaches", leaves_buffer)),
    ("side_by_side", _method("side_by_side", shares_globally)),
    ("seeded", _method("seeded", draws_elsewhere)),
    ("half_precision", broken("half_precision", fast=lambda s, x, y, f: LowRank.fast(s, x, y, f).float())),
    ("quick_equals_dense", broken("quick", fast=scaled)),
    ("generates", broken("generates", fast=by_position)),
    ("checkpointing", broken("checkpointing", fast=counts_calls)),
    ("copies", _method("copies", holds_lock)),
    ("compiles", broken("compiles", fast=reads_number)),
    ("autocast", broken("autocast", fast=lost_in_half)),
    ("compiled_passes", broken("compiled_passes", fast=other_when_compiled)),
    ("fakes", broken("fakes", fast=reads_number)),
    ("routes", broken("routes", fast=mixes_rows)),
    ("registered", _method("registered", holds_a_tensor)),
    ("base_untouched", _method("base_untouched", writes_an_attribute)),
    ("dense_weight", broken("dense_weight", fast=reads_the_weight)),
    ("round_trip", _method("round_trip_number", counts_steps, schedule=counted_up)),
    ("round_trip", _method("round_trip_finish", Sound.build, post_hoc=halved)),
    ("round_trip", _method("round_trip_shapes", Sound.build, post_hoc=cut)),
    ("round_trip", _method("round_trip_aux", Sound.build, aux_loss=runs_away)),
    ("quick_equals_dense", broken("quick_training", weight=doubled_in_training)),
    ("gradient", broken("gradient", fast=detaches_input)),
    ("off", broken("off_cache", fast=keeps_the_first)),
    ("repeats", _method("repeats", Sound.build, schedule=remembers)),
    ("accumulates", _method("accumulates", Sound.build, aux_loss=adds_up)),
    ("counted", _method("counted_cpu", on_the_cpu)),
    ("seeded", _method("seeded_fixed", one_generator)),
    ("seeded", _method("seeded_torch", seeds_torch)),
    ("half_precision", _method("half_precision_wide", in_float32)),
    ("registered", _method("registered_base", copies_the_base)),
    ("registered", _method("registered_table", keeps_in_a_table)),
    ("round_trip", _method("round_trip_thawed", Sound.build, schedule=thaws)),
    ("side_by_side", broken("side_by_side_merged", fast=more_beside_another)),
    ("values", _method("values", Sound.build, count=by_default_rank)),
    ("values", _method("values_dropout", drops, **DROPOUT)),
    ("drops", _method("drops_unscaled", with_dropout(unscaled), **DROPOUT)),
    ("drops", _method("drops_twice", with_dropout(scaled_twice), **DROPOUT)),
    ("effects", _method("effects", Sound.build, **IDLE)),
    ("late", _method("late", Sound.build, schedule=ends_of(700))),
    ("resumes", _method("resumes", Sound.build, schedule=warms_up)),
    ("effects", _method("effects_aux", Sound.build, aux_loss=no_gradient, **IDLE)),
    ("registered", broken("registered_passes", fast=keeps_passes)),
    ("strides", broken("strides", fast=views)),
    ("forgets", broken("forgets", fast=taps)),
    ("elsewhere", Hashed),
    ("rates", _method("rates", Sound.build, optimizer=lambda self, groups: OwnRate(groups))),
    ("drops", broken("drops_scaled", fast=more_in_training)),
    ("drops", _method("drops_base", drops_the_base, **DROPOUT)),
    ("alive", _method("alive_grads", Sound.build, dataclasses.replace(TAGS, needs_data=True), init=with_a_gradient)),
    ("values", _method("values_shared", shared_scale, **SCALE)),
    ("finishes", _method("finishes", Sound.build, post_hoc=halved_at_other_ranks)),
    ("merges", broken("merges_again", weight=merged_before)),
    (
        "kinds",
        _method(
            "kinds", lambda self, place: SoundDelta(place, *lora_factors(place, self.r), 1.0), count=without_experts
        ),
    ),
    ("kinds", _method("kinds_transposed", swapped)),
    ("fields", _method("fields", Sound.build, model_config=ConfigDict(frozen=True, extra="ignore"))),
]


@pytest.fixture
def known() -> Iterator[None]:
    """Let the registry know the gallery, so that it can be saved and loaded."""
    table = registry.methods()
    added = {cls.name: cls for cls in (Sound, Reader, *(c for _, c in GALLERY), *(c for _, c, *_ in READERS))}
    table.update(added)
    yield
    for name in added:
        table.pop(name)


def _slow(check: str, *more: Any) -> Any:
    return pytest.param(check, *more, marks=pytest.mark.slow if check in LONG else ())


@pytest.mark.parametrize("check", [_slow(c) for c in CHECKS])
@pytest.mark.usefixtures("known")
def test_the_sound_one_passes(check: str) -> None:
    CHECKS[check](Case(Sound(), "decoder"))


@pytest.mark.parametrize(("check", "cls"), [_slow(*exhibit) for exhibit in GALLERY], ids=[c.name for _, c in GALLERY])
@pytest.mark.usefixtures("known")
def test_bites(check: str, cls: type[Method]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any failure will do, but not of the harness
        CHECKS[check](Case(cls(), "decoder"))
    assert not isinstance(caught.value, NameError | ImportError | KeyError), repr(caught.value)


# The whole registry pays for these; here nothing hangs on them.
SEEN = {name: check for name, check in CHECKS.items() if name not in LONG}


@pytest.mark.parametrize("model", ["decoder", "encoder"])
@pytest.mark.usefixtures("known")
def test_the_sound_reader_passes(model: str) -> None:
    for check in SEEN.values():
        check(Case(Reader(), model))


@pytest.mark.parametrize(("check", "cls", "model", "also"), quick(READERS, 3))
@pytest.mark.usefixtures("known")
def test_a_wrong_reader_is_seen_by_no_other_check(check: str, cls: type[Method], model: str, also: set[str]) -> None:
    failed = set()
    for name, function in SEEN.items():
        try:
            function(Case(cls(), model))
        except (PeftreeError, AssertionError, RuntimeError, ValueError):
            failed.add(name)
    assert failed == {check} | also


def test_every_check_has_an_exhibit() -> None:
    assert {check for check, *_ in (*GALLERY, *READERS)} == set(CHECKS)
