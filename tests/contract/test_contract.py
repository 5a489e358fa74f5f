"""Every check over every method: one architecture a method in the quick run, all of them in the slow one.

A recipe that gives a method other defaults has every check on one architecture, in the slow run. What hangs on the
method more than on the model is checked on the architecture of the quick run, some of it on one other, in turn. Fake
tensors are tried on that other alone; compiling on that of the quick run, of twelve methods one in training
and one in a pass without a graph. graft/test_copies.py, train/test_compile.py and plan/ do some more.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pytest

import zoo
from contract.case import fits, small
from contract.checks import CHECKS
from peftree import registry
from peftree.errors import PeftreeError

METHODS = list(registry.methods())
DEAR = {"compiles", "compiled_passes", "fakes", "heaps", "copies", "other_active", "generates"}
TWICE = {"round_trip", "learns", "half_precision"}  # on two architectures a method
ONCE = {
    "copies", "seeded", "base_untouched", "registered", "combines_to_itself", "fields", "frozen_base", "side_by_side",
    "other_active",
}  # fmt: skip
VARIANT = ("identity", "counted", "round_trip", "merges", "fields")  # what other defaults alone can break


def quick_model(name: str) -> str:
    """The architecture of the quick run: a decoder, where most checks apply, or one that sees images."""
    return "vit" if all(term.startswith("vision:") for term in registry.get(name)().sites.split()) else "decoder"


def variant(name: str) -> bool:
    """Whether a method is another with other defaults, without a file of code."""
    cls = registry.get(name)
    return cls.__module__ == cls.__bases__[0].__module__


def quick_checks(name: str) -> set[str]:
    """The checks of the quick run: all but the dearest."""
    return set(VARIANT) if variant(name) else set(CHECKS) - DEAR


@cache
def in_turn(name: str, *but: str) -> str:
    """The architecture, other than `but`, that falls to the method: in turn, of those that it fits; empty if none."""
    turn, every = METHODS.index(name) % len(zoo.CORE), [*zoo.CORE]
    return next((m for m in every[turn:] + every[:turn] if m not in but and fits(small(name, m))), "")


def run(name: str, model: str, checks: Iterable[str]) -> None:
    case = small(name, model)
    if not fits(case):
        with pytest.raises(PeftreeError):
            case.adapted()
        return
    problems = []
    for check in sorted(set(checks) - set(case.tags.known)):
        try:
            CHECKS[check](case)
        except Exception as error:
            problems.append(f"{check}: {type(error).__name__}: {str(error)[:400]}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str) -> None:
    run(name, quick_model(name), quick_checks(name))


@pytest.mark.slow
@pytest.mark.parametrize("model", zoo.CORE)
@pytest.mark.parametrize("name", METHODS)
def test_the_whole_contract(name: str, model: str) -> None:
    quick = quick_model(name)
    other = in_turn(name, quick) or quick
    checks = set(VARIANT) if variant(name) and model != quick else set(CHECKS)
    if model == quick:
        checks -= quick_checks(name)
    elif model != other:
        checks -= TWICE
    first = quick if fits(small(name, quick)) else other
    checks -= ONCE if model != first else set()
    turn = METHODS.index(name) % 12
    checks -= {"compiled_passes"} if turn != 0 else set()  # ten seconds
    checks -= {"compiles"} if turn != 6 else set()
    places = {"compiles": first, "compiled_passes": first, "fakes": quick if variant(name) else other}
    run(name, model, {check for check in checks if places.get(check, model) == model})


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
