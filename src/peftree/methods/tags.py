"""Tags: the facts that a method declares. Nothing here needs torch, so they can be read without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peftree.catalogue import Branch


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
        lr_from: where that rate is from: a place in the paper, or in the authors' code if nobody else is named, as
            `table 9` or `train.sh`; with the optimizer if it is not AdamW or Adam. Empty: peftree chose it.
        small: fields that fit models a few dozen units wide; its checks and examples use them.
        known: checks of the contract that it fails on some model, each with the reason in the paper.
        peft: the same method in Hugging Face PEFT, if the two differ only in names.
    """

    branch: Branch
    paper: str
    identity_at_init: bool
    mergeable: bool
    lr: float
    lr_from: str = ""
    lengthens_sequence: bool = False
    needs_data: bool = False
    needs_dense_weight: bool = False
    keeps_weight: bool = False
    inference_cost: Literal["none", "low", "tokens", "network"] = "none"
    small: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)
    peft: Peft | None = None


def of_recipe(base: Tags, branch: Branch, paper: str, said: Mapping[str, Any]) -> Tags:
    """Return the tags of a recipe: those of its base, with what its file says.

    What the base says of its rate's source holds for the base's paper and rate, not for others.
    """
    where = base.lr_from if paper == base.paper and "lr" not in said else ""
    return replace(base, **{"lr_from": where, **said, "branch": branch, "paper": paper})


def of_parts(small: Mapping[str, Any]) -> Tags:
    """Return what is assumed of a recipe with several parts; `small` holds that of each part by its name."""
    return Tags("hybrid", "", identity_at_init=False, mergeable=False, lr=1e-3, small=small)
