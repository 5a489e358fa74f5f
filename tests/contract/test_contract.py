"""Every check over every method: one architecture a method in the quick run, all of them in the slow one.

A recipe that gives a method other defaults has every check on one architecture, in the slow run. Compiling, two fifths
of all the time, is tried on one architecture a method, in turn, and compiled training on that of the quick run;
graft/test_copies.py does some more.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

import zoo
from contract.case import fits, small
from contract.checks import CHECKS
from peftree import registry
from peftree.errors import PeftreeError

METHODS = list(registry.methods())
COMPILED = {"compiles", "compiled_passes"}
VARIANT = ("identity", "counted", "round_trip", "merges", "fields")  # what other defaults alone can break


def quick_model(name: str) -> str:
    """The architecture of the quick run: a decoder, where most checks apply, or one that sees images."""
    return "vit" if all(term.startswith("vision:") for term in registry.get(name)().sites.split()) else "decoder"


def variant(name: str) -> bool:
    """Whether a method is another with other defaults, without a file of code."""
    cls = registry.get(name)
    return cls.__module__ == cls.__bases__[0].__module__


def quick_checks(name: str) -> set[str]:
    """The checks of the quick run: all but compiling, the dearest."""
    return set(VARIANT) if variant(name) else set(CHECKS) - COMPILED


def compiled(name: str) -> str:
    """The architecture on which the method is compiled: in turn, of those that it fits; empty if it fits none."""
    turn, every = METHODS.index(name) % len(zoo.CORE), [*zoo.CORE]
    return next((model for model in every[turn:] + every[:turn] if fits(small(name, model))), "")


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
    if model == quick_model(name):
        checks = set(CHECKS) - quick_checks(name)
    else:
        checks = set(VARIANT) if variant(name) else set(CHECKS)
    places = {"compiles": compiled(name), "compiled_passes": quick_model(name)}
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
