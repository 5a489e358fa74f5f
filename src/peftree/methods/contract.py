"""The contract: what a method is. A method file fills this in and nothing else changes.

A method is a frozen pydantic model (its fields are the paper's hyper-parameters) with a `build` that, given a place,
returns a delta: a module with the tensors and one of the five verbs of `peftree.deltas`. `Tags` declares facts.
Five optional hooks act in time, each on the whole adapter: `init`, `schedule`, `aux_loss`, `param_groups`, `post_hoc`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from peftree.deltas import Delta, FusedOutput, FusedWeight, Place, Reweight, Rewrite, gated
from peftree.errors import MethodError
from peftree.sites import Site

__all__ = [
    "Branch", "Delta", "Deltas", "Field", "Fusion", "Method", "Moment", "Place", "Recipe", "Site", "Tags", "Union",
]  # fmt: skip

Branch = Literal["additive", "selective", "reparameterized", "hybrid", "moe", "unified", "reference"]
Deltas = Mapping[str, Delta]
"""A whole adapter as hooks see it: delta by its key, in model order."""


@dataclass(frozen=True)
class Tags:
    """Declared facts about a method; tests hold it to them, and tables, merge and planner derive from them.

    Attributes:
        branch: its branch of the survey's tree; equal to the folder it lives in.
        paper: where it comes from, as `arXiv 2106.09685`.
        identity_at_init: the adapted model equals the base model before the first step.
        mergeable: it can be folded into the weights.
        lengthens_sequence: it adds tokens or attention slots.
        needs_data: `init` must see training batches first.
        needs_dense_weight: its forward reads the dense base weight.
        inference_cost: `none` (once merged), `low`, `tokens` or `network`.
        lr: the default learning rate with AdamW.
    """

    branch: Branch
    paper: str
    identity_at_init: bool
    mergeable: bool
    lr: float
    lengthens_sequence: bool = False
    needs_data: bool = False
    needs_dense_weight: bool = False
    inference_cost: Literal["none", "low", "tokens", "network"] = "none"


@dataclass
class Moment:
    """Where training stands when a hook is called.

    Attributes:
        step: optimizer steps done; total: steps planned.
        outputs: the model's output for this batch (aux_loss only).
        again: runs the same batch once more and returns its output (aux_loss only).
    """

    step: int = 0
    total: int = 0
    outputs: Any = None
    again: Callable[[], Any] | None = None


class Method(BaseModel):
    """One method with its fields. Subclasses add fields, `tags` and `build`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    name: ClassVar[str] = ""
    tags: ClassVar[Tags]

    sites: str = Field(
        "linear",
        description="where: roles such as `attn.q attn.v`, see `peftree inspect`",
        min_length=1,
    )
    layers: str = Field(
        "", coerce_numbers_to_str=True, description="layer range such as `0-3,8` or `-4:`; empty: all layers"
    )

    def build(self, place: Place) -> Delta:
        """Return the delta for one place; called once per site, in model order."""
        raise TypeError(f"{type(self).__name__} defines no build()")

    def parts(self) -> Sequence[Method]:
        """Return the methods this one is made of; a plain method is its own only part."""
        return (self,)

    def wrap(self, place: Place, delta: Delta) -> Delta:
        """Return what is grafted for a part's delta; a gated recipe puts a gate around it."""
        return delta

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        """Hook: set the deltas from data before training. Each batch is a call that returns the loss."""

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        """Hook: after each optimizer step, gradients still there; may change values, masks and ranks."""

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        """Hook: a term to add to the training loss."""
        return None

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        """Hook: optimizer groups; by default one group of all trainable tensors at `lr`."""
        return [{"params": trainable(deltas.values()), "lr": lr}]

    def post_hoc(self, deltas: Deltas) -> None:
        """Hook: once after training."""

    def __add__(self, other: Method) -> Union:
        """Return both methods as one adapter: `LoRA(r=8) + PrefixTuning(length=10)`."""
        return Union(members=[*self.parts(), *other.parts()])


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the trainable parameters of `modules`, each once."""
    seen: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                seen[id(parameter)] = parameter
    return list(seen.values())


def own(deltas: Deltas, index: int) -> dict[str, Delta]:
    """Return the deltas of part `index` of a method with several parts."""
    return {k: d for k, d in deltas.items() if k.rsplit("/", 1)[-1].startswith(f"p{index}_")}


class Union(Method):
    """Several methods as one adapter: `y = base + part_1 + part_2 ...`, each at its own sites."""

    name: ClassVar[str] = "union"
    tags: ClassVar[Tags] = Tags("hybrid", "", identity_at_init=False, mergeable=False, lr=1e-3)
    members: list[Any] = Field(default_factory=list, description="the methods")

    def parts(self) -> Sequence[Method]:
        """Return the members."""
        return tuple(self.members)

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        """Let every part that needs data see it."""
        kept = list(batches)
        for i, part in enumerate(self.parts()):
            part.init(own(deltas, i), kept)

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        """Run every part's schedule."""
        for i, part in enumerate(self.parts()):
            part.schedule(own(deltas, i), moment)

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        """Sum the parts' terms."""
        terms = [p.aux_loss(own(deltas, i), moment) for i, p in enumerate(self.parts())]
        found = [t for t in terms if t is not None]
        return sum(found[1:], found[0]) if found else None

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        """Collect the parts' groups."""
        groups = [g for i, p in enumerate(self.parts()) for g in p.param_groups(own(deltas, i), lr)]
        rest = [d for k, d in deltas.items() if not k.rsplit("/", 1)[-1].startswith("p")]
        return [*groups, {"params": trainable(rest), "lr": lr}] if trainable(rest) else groups

    def post_hoc(self, deltas: Deltas) -> None:
        """Run every part's."""
        for i, part in enumerate(self.parts()):
            part.post_hoc(own(deltas, i))


class Recipe(Union):
    """A union whose members are named fields; made from a recipe file."""

    member_names: ClassVar[tuple[str, ...]] = ()
    gated: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _keep_rest(cls, value: Any) -> Any:
        """Let `{"prefix_tuning": {"length": 3}}` change that one field of the recipe's own part."""
        if not isinstance(value, dict):
            return value
        for name in ("sites", "layers", "members"):
            if value.get(name, default := cls.model_fields[name].get_default(call_default_factory=True)) != default:
                raise ValueError(f"a recipe has no {name} of its own; set {cls.member_names[0]}.{name} and so on")
        return {k: cls._merged(k, v) if isinstance(v, dict) and k in cls.member_names else v for k, v in value.items()}

    @classmethod
    def _merged(cls, name: str, changes: dict[str, Any]) -> Method:
        part: Method = cls.model_fields[name].default
        try:
            return type(part)(**(dict(part) | changes))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in (name, *first["loc"]))
            known = ", ".join(sorted(type(part).model_fields))
            raise ValueError(f"{where}={first['input']!r}: {first['msg']} (fields of {name}: {known})") from None

    def parts(self) -> Sequence[Method]:
        """Return the members in the order of the recipe."""
        return tuple(getattr(self, n) for n in self.member_names)

    def wrap(self, place: Place, delta: Delta) -> Delta:
        """Put a gate around the part if the recipe says so."""
        return gated(place, delta) if self.gated else delta


class Fusion(Method):
    """Weighted sum of the effects of several adapters at the same sites: what `combine` makes."""

    name: ClassVar[str] = "fusion"
    tags: ClassVar[Tags] = Tags("unified", "", identity_at_init=False, mergeable=True, lr=1e-4)
    members: list[Any] = Field(default_factory=list, description="the methods whose effects are summed")
    weights: list[float] = Field(default_factory=list, description="one factor a member")

    def build(self, place: Place) -> Delta:
        """Return the fused delta of the members' deltas."""
        deltas = [m.build(place.apart(f"member {i}")) for i, m in enumerate(self.members)]
        if all(isinstance(d, Reweight) for d in deltas):
            return FusedWeight(deltas, self.weights)
        if all(isinstance(d, Rewrite) for d in deltas) and len({d.reads for d in deltas}) == 1:
            return FusedOutput(deltas, self.weights)
        kinds = ", ".join(sorted({type(d).__name__ for d in deltas}))
        raise MethodError(
            f"Effects of {kinds} at {place.site.name} have no weighted sum.",
            "Combine adapters of one kind that change weights or outputs, or stack them with switch(model, [a, b]).",
        )
