"""Every check over every method: one architecture a method in the quick run, of every third another in the slow one.

A method that is new or changed since it passed the whole contract (`passed.json`) has every check on every
architecture, in the quick run too. Of the others, what hangs on the method more than on the model is checked on the
architecture of the quick run alone; fake tensors on the other; what takes seconds (`TURNS`) on that of the quick run,
each of 24 methods in turn. A recipe that gives a method other defaults has every check on one
architecture. graft/test_copies.py, train/test_compile.py and plan/ do some more.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

import zoo
from contract.case import fits, small
from contract.checks import CHECKS
from contract.passed import changed, every, failures, models, quick_model
from peftree import registry
from peftree.errors import PeftreeError

METHODS = list(registry.methods())
CHANGED = [name for name in METHODS if changed(name)]
DEAR = {
    "compiles", "compiled_passes", "fakes", "heaps", "copies", "other_active", "generates", "values", "kinds",
    "gradient", "repeats", "accumulates", "combines_to_itself", "drops", "effects", "late", "resumes",
    "strides", "forgets", "elsewhere", "finishes",
}  # fmt: skip
ONCE = {
    "copies", "seeded", "base_untouched", "registered", "combines_to_itself", "fields", "frozen_base", "side_by_side",
    "other_active", "compiles", "compiled_passes", "values", "kinds", "repeats", "effects", "late", "resumes",
    "rates", "forgets", "elsewhere", "finishes",
}  # fmt: skip
TURNS = {"compiled_passes": 0, "late": 6, "elsewhere": 9, "compiles": 12, "forgets": 15, "effects": 18}  # of 24
VARIANT = ("identity", "counted", "round_trip", "merges", "fields")  # what other defaults alone can break


def variant(name: str) -> bool:
    """Whether a method is another with other defaults, without a file of code."""
    cls = registry.get(name)
    return cls.__module__ == cls.__bases__[0].__module__


def quick_checks(name: str) -> set[str]:
    """The checks of the quick run: all but the dearest."""
    return set(VARIANT) if variant(name) else set(CHECKS) - DEAR


def in_turn(name: str, but: str) -> str:
    """The architecture, other than `but`, that falls to the method: in turn, of those that it fits; `but` if none."""
    turn, models = METHODS.index(name) % len(zoo.CORE), [*zoo.CORE]
    return next((m for m in models[turn:] + models[:turn] if m != but and fits(small(name, m))), but)


def run(name: str, model: str, checks: Iterable[str]) -> None:
    problems = failures(name, model, checks)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str) -> None:
    run(name, quick_model(name), quick_checks(name))


@pytest.mark.parametrize(("name", "model"), [(name, model) for name in CHANGED for model in models(name)])
def test_the_whole_contract(name: str, model: str) -> None:
    run(name, model, every(name, model) - (quick_checks(name) if model == quick_model(name) else set()))


def again(name: str) -> dict[str, set[str]]:
    """What a method that passed every check has once more: the rest of the quick run's, some on another model."""
    some, quick = set(CHECKS), quick_model(name)
    other = in_turn(name, quick)
    turn = METHODS.index(name) % 24
    some -= {check for check, its in TURNS.items() if its != turn}
    here, there = some - quick_checks(name), some
    if fits(small(name, quick)) and other != quick:
        there = set(VARIANT) if variant(name) else some - ONCE
        here -= set() if variant(name) else {"fakes"}
        there = there if turn % 3 == 0 else {"fakes"} - here
    return {other: there, quick: here}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in CHANGED])
def test_the_contract_again(name: str) -> None:
    for model, checks in again(name).items():
        run(name, model, checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_refused_where_it_does_not_fit(name: str) -> None:
    for model in zoo.CORE:
        run(name, model, ())


@pytest.mark.parametrize("name", [n for n in METHODS if registry.get(n).tags.known])
def test_what_a_method_says_it_does_not_keep_it_does_not_keep(name: str) -> None:
    for check in registry.get(name).tags.known:
        failed = 0
        for case in (small(name, model) for model in zoo.CORE):
            try:
                CHECKS[check](case)
            except (PeftreeError, AssertionError):
                failed += 1
        assert failed, f"{name} keeps {check} on every model: take it out of `known`"
