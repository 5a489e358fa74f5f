"""Every check over every method and five architectures; what does not apply is a ledger with reasons."""

from __future__ import annotations

import pytest

import zoo
from contract.checks import CHECKS, Case
from peftree import registry
from peftree.errors import PeftreeError

METHODS = list(registry.methods())

# (method, model) -> why the method refuses this model. Strict: it must refuse, and nothing else may.
REFUSES = {
    ("bitfit", "decoder"): "a Llama has no biases",
    ("bitfit", "encoder_decoder"): "a T5 has no biases",
    ("vpt", "decoder"): "for vision stacks",
    ("vpt", "encoder"): "for vision stacks",
    ("vpt", "encoder_decoder"): "for vision stacks",
    ("head_only", "encoder_decoder"): "",
}
REFUSES = {k: v for k, v in REFUSES.items() if v}

# Settings for models of width 32; a method without an entry is checked with its defaults.
SMALL: dict[str, dict[str, object]] = {
    "prompt_tuning": {"length": 3},
    "prefix_tuning": {"length": 3},
    "pfeiffer": {"reduction": 2},
    "propetl": {"reduction": 4},
    "mam": {"prefix_tuning": {"length": 3}},
    "unipelt": {"prefix_tuning": {"length": 3}, "pfeiffer": {"reduction": 2}},
}

# (method, model, check) -> a known failure with its reason. Strict: it must fail.
KNOWN = {
    (
        "full",
        "encoder_decoder",
        "routes",
    ): "T5's position bias is computed once for the whole batch",
} | {
    (name, model, "side_by_side"): "the last of two whole copies replaces the one before"
    for name in ("full", "head_only")
    for model in zoo.CORE
}


@pytest.mark.parametrize("model", zoo.CORE)
@pytest.mark.parametrize("name", METHODS)
def test_contract(name: str, model: str) -> None:
    case = Case(registry.make(name, SMALL.get(name, {})), model)
    if (name, model) in REFUSES:
        with pytest.raises(PeftreeError):
            case.adapted()
        return
    problems = []
    for check, function in CHECKS.items():
        try:
            function(case)
        except Exception as error:
            if (name, model, check) not in KNOWN:
                problems.append(f"{check}: {type(error).__name__}: {str(error)[:400]}")
        else:
            if (name, model, check) in KNOWN:
                problems.append(f"{check}: passes, but the ledger says it fails")
    assert not problems, "\n".join(problems)


def test_ledger_names_real_methods() -> None:
    named = {k[0] for k in (*REFUSES, *KNOWN)}
    assert named <= set(METHODS)
