"""The contract: what a method is. A method file fulfils it, and no other file changes.

A method is a frozen pydantic model (its fields are the paper's hyper-parameters) with a `build` that, given a place,
returns a delta: a module with the tensors and one of the five verbs of `peftree.deltas`. `Tags` declares facts.
Seven optional hooks act over time, each on the whole adapter: `init`, `param_groups`, `optimizer`, `aux_loss`,
`before_step`, `schedule`, `post_hoc`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from peftree.catalogue import Branch
from peftree.deltas import Delta, FusedOutput, FusedWeight, Place, Reweight, Rewrite, gated
from peftree.deltas.combine import GatedMemory, GatedOutput
from peftree.errors import MethodError
from peftree.methods import bysite
from peftree.sites import Site

__all__ = [
    "Composed", "Delta", "Deltas", "Field", "Fusion", "Method", "Moment", "Peft", "Place", "Recipe", "Site",
    "Tags", "Union",
]  # fmt: skip

Deltas = Mapping[str, Delta]
"""A whole adapter as hooks see it: delta by its key, in model order."""


@dataclass(frozen=True)
class Peft:
    """The same method in Hugging Face PEFT, where it sits at the modules that `target_modules` names.

    Attributes:
        type: its `peft_type`.
        fields: our field by the key of PEFT's config that means the same.
        tensors: our tensor by the end of its name in PEFT's file; `B.T`: it is transposed there. A name that begins
            with `base_model.` belongs to the whole model: a tensor that the deltas share.
        fixed: values that other PEFT keys must have for the method to be this one; saving writes them.
        kinds: the kinds of sites that PEFT can put it at.
        values: PEFT's value by ours, for keys whose values differ; our other values have no form in PEFT.
        frozen: names, as in `tensors`, of what PEFT's file holds and ours does not, with the delta's attribute (dotted)
            that must equal it, or None where PEFT's file has none.
    """

    type: str
    fields: Mapping[str, str]
    tensors: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("linear",)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tags:
    """Declared facts about a method; tests check them, and tables, merging and the planner derive from them.

    Attributes:
        branch: its branch of the survey's tree; equal to the folder it lives in.
        paper: where it comes from, as `arXiv 2106.09685`.
        identity_at_init: the adapted model equals the base model before the first step.
        mergeable: it can be folded into the weights.
        lengthens_sequence: it adds tokens or attention slots.
        needs_data: `init` must see training batches first.
        needs_dense_weight: its forward or its start reads the dense base weight.
        keeps_weight: a hook reads base weights that a pass has read before; a run that shards the base has freed them.
        inference_cost: `none` (once merged), `low`, `tokens` or `network`.
        lr: the default learning rate with AdamW.
        small: fields that fit models a few dozen units wide; its checks and examples use them.
        known: checks of the contract that it fails on some model, each with the reason in the paper.
        peft: the same method in Hugging Face PEFT, if the two differ only in names.
    """

    branch: Branch
    paper: str
    identity_at_init: bool
    mergeable: bool
    lr: float
    lengthens_sequence: bool = False
    needs_data: bool = False
    needs_dense_weight: bool = False
    keeps_weight: bool = False
    inference_cost: Literal["none", "low", "tokens", "network"] = "none"
    small: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)
    peft: Peft | None = None


@dataclass
class Moment:
    """The state of training when a hook is called.

    Attributes:
        step: optimizer steps done; total: steps planned.
        start: whether a run starts or resumes here, so that there are no gradients yet (schedule only).
        optimizer: the optimizer, if there is one; its state may be reset or moved (before_step and schedule only).
        batches: callables that return the loss of more training batches, in an order set by the step; made as they are
            taken (schedule only).
        outputs: the model's output for this batch (aux_loss only).
        again: runs the same batch once more and returns its output (aux_loss only).
    """

    step: int = 0
    total: int = 0
    start: bool = False
    optimizer: Any = None
    batches: Iterable[Callable[[], Tensor]] = ()
    outputs: Any = None
    again: Callable[[], Any] | None = None


class Method(BaseModel):
    """One method with its fields. Subclasses add fields, `tags` and `build`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    name: ClassVar[str] = ""
    tags: ClassVar[Tags]

    sites: str = Field(
        "linear",
        description="where: roles such as `attn.q attn.v` (see `peftree inspect`), module paths, or `linear`",
        min_length=1,
    )
    layers: str = Field(
        "", coerce_numbers_to_str=True, description="layer range such as `0-3,8`, `-4:` or `:2`; empty: all layers"
    )
    by_site: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="field values at some sites, written `r={attn.q: 16, ffn: 4}`"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_site(cls, value: Any) -> Any:
        """Read `r={"attn.q": 16}` as a value by site, and refuse to read a boolean as a number."""
        return bysite.moved(cls, value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _by_site_fits(self) -> Self:
        """Check values by site as their fields are checked."""
        rest = {n: getattr(self, n) for n in type(self).model_fields if n != "by_site"}

        def make(name: str, where: str, value: Any) -> Any:
            try:
                return getattr(type(self)(**(rest | {name: value})), name)
            except ValidationError as error:
                why = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"{name}={str(value)[:80]!r} at {where[:80]!r}: {why}") from None

        if self.by_site:
            self.by_site.update(bysite.checked(self, self.by_site, make))
        return self

    def at(self, site: Site, means: Callable[[str, str, Site], bool]) -> Method:
        """Return this method with the fields it has at `site`; of the keys that match the site, the last one counts.

        Args:
            site: a site of the adapter.
            means: tells whether a field's key matches a site.
        """
        own = {f: v for f, terms in self.by_site.items() for t, v in terms.items() if means(f, t, site)}
        return self.model_copy(update=own | {"by_site": {}}) if self.by_site else self

    def build(self, place: Place) -> Delta:
        """Return the delta for one place; called once per site, in model order."""
        raise TypeError(f"{type(self).__name__} defines no build()")

    def count(self, sites: Sequence[Site]) -> int:
        """Return the number of trainable entries at `sites` in closed form, from the fields and the sites' widths."""
        raise TypeError(f"{type(self).__name__} defines no count(sites)")

    def parts(self) -> Sequence[Method]:
        """Return the methods this one is made of; a plain method is its only part."""
        return (self,)

    def of(self, members: Sequence[Method]) -> Method:
        """Return this method, made from adapters of the methods `members`."""
        raise MethodError(f"{self.name} is not made from other adapters.", "Leave sources out.")

    def wrap(self, place: Place, delta: Delta) -> Delta:
        """Return the module to graft for a part's delta; a gated recipe puts a gate around it."""
        return delta

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        """Hook: set the deltas from data before training. Each batch is a callable that returns the loss."""

    def before_step(self, deltas: Deltas, moment: Moment) -> None:
        """Hook: before each optimizer step, on the gradients that the step will use; may change them."""

    def schedule(self, deltas: Deltas, moment: Moment) -> None:
        """Hook: after each optimizer step, before gradients are cleared, and once when a run starts or resumes.

        May change values, masks, ranks, and which tensors are trained.
        """

    def aux_loss(self, deltas: Deltas, moment: Moment) -> Tensor | None:
        """Hook: a term to add to the training loss."""
        return None

    def param_groups(self, deltas: Deltas, lr: float) -> list[dict[str, Any]]:
        """Hook: optimizer groups; by default one group of all trainable tensors at `lr`."""
        return [{"params": trainable(deltas.values()), "lr": lr}]

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """Hook: the optimizer of these groups, if the method has its own; None: the run's.

        Its state must be tensors and plain numbers by parameter, so that a run resumes, and its step must not depend on
        values, so that a plan can count its memory.
        """
        return None

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
    """Return the deltas of part `index`, each as that part made it, without the gate that a recipe puts around it."""
    mine = {k: d for k, d in deltas.items() if d.part == index}
    return {k: d.inner if isinstance(d, GatedOutput | GatedMemory) else d for k, d in mine.items()}


class Union(Method):
    """Several methods as one adapter: `y = base + part_1 + part_2 ...`, each at its own sites."""

    name: ClassVar[str] = "union"
    tags: ClassVar[Tags] = Tags("hybrid", "", identity_at_init=False, mergeable=False, lr=1e-3)
    members: list[Any] = Field(default_factory=list, description="the methods")

    def parts(self) -> Sequence[Method]:
        """Return the members."""
        return tuple(self.members)

    def init(self, deltas: Deltas, batches: Iterable[Callable[[], Tensor]]) -> None:
        """Show data to every part that needs it."""
        kept = list(batches)
        for i, part in enumerate(self.parts()):
            part.init(own(deltas, i), kept)

    def before_step(self, deltas: Deltas, moment: Moment) -> None:
        """Run every part's."""
        for i, part in enumerate(self.parts()):
            part.before_step(own(deltas, i), moment)

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
        """Collect the parts' groups; task heads and gates form one more."""
        groups = [g for i, p in enumerate(self.parts()) for g in p.param_groups(own(deltas, i), lr)]
        taken = {id(p) for g in groups for p in g["params"]}
        rest = [p for p in trainable(deltas.values()) if id(p) not in taken]
        return [*groups, {"params": rest, "lr": lr}] if rest else groups

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """Refuse parts that have an optimizer of their own: a single optimizer steps all groups."""
        if own := [p.name for p in self.parts() if type(p).optimizer is not Method.optimizer]:
            what = f"{' and '.join(own)} has an optimizer of its own, which does not know the other parts."
            raise MethodError(what, "Train it alone, or as a separate adapter.")
        return None

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
        for name in ("sites", "layers", "by_site", "members"):
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


class Composed(Method):
    """A method made from other adapters, of which it holds frozen copies: `adapt(model, method, sources=[a, b])`.

    Its deltas have them as `members`, a list of modules.
    """

    members: list[Any] = Field(
        default_factory=list, description="methods of the adapters that it is made from; set by `sources`"
    )

    def of(self, members: Sequence[Method]) -> Method:
        """Return this method with these members.

        Raises:
            MethodError: a member has several parts.
        """
        if several := [m.name for m in members if len(m.parts()) > 1]:
            raise MethodError(
                f"{self.name} is made from adapters of one part, but {several[0]} has more.", "Leave it out."
            )
        return self.model_copy(update={"members": list(members)})

    def inner(self, place: Place, fresh: Callable[[], Delta], count: int = 2) -> list[Delta]:
        """Return the members' frozen deltas at a place; without members, `count` trainable deltas of its own."""
        if not self.members:
            return [fresh() for _ in range(count)]
        made: list[Delta] = [m.build(place.apart(f"member {i}")) for i, m in enumerate(self.members)]
        return [m.requires_grad_(False) for m in made]


class Fusion(Method):
    """Weighted sum of the effects of several adapters at the same sites: what `combine` makes."""

    name: ClassVar[str] = "fusion"
    tags: ClassVar[Tags] = Tags("unified", "", identity_at_init=False, mergeable=True, lr=1e-4)
    members: list[Any] = Field(default_factory=list, description="the methods whose effects are summed")
    weights: list[float] = Field(default_factory=list, description="one factor per member")

    def at(self, site: Site, means: Callable[[str, str, Site], bool]) -> Method:
        """Return the fusion of the members with the fields they have at `site`."""
        return self.model_copy(update={"members": [m.at(site, means) for m in self.members]})

    def build(self, place: Place) -> Delta:
        """Return the fused delta of the members' deltas."""
        deltas = [m.build(place.apart(f"member {i}")) for i, m in enumerate(self.members)]
        if all(isinstance(d, Reweight) for d in deltas):
            return FusedWeight(deltas, self.weights)
        if all(isinstance(d, Rewrite) for d in deltas) and len({d.reads for d in deltas}) == 1:
            return FusedOutput(deltas, self.weights)
        kinds = ", ".join(sorted({type(d).__name__ for d in deltas}))
        raise MethodError(
            f"Effects of {kinds} at {place.site.name} cannot be summed with weights.",
            "Combine adapters of one kind that change weights or outputs, or stack them with switch(model, [a, b]).",
        )
