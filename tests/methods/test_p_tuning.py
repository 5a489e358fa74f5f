"""P-tuning's LSTM against its equations, and folded away; the contract has the other network."""

from __future__ import annotations

from typing import Any

import peftree
import reference_model as bench
import zoo
from reference import p_tuning as reference


def test_the_lstm_is_its_equations_and_folds_to_its_tokens() -> None:
    model = zoo.build("llama").eval()
    adapter = peftree.adapt(model, "p_tuning", length=3, hidden=6)
    assert adapter.method.encoder == "lstm"
    assert adapter.method.count([s for _, s, _ in adapter.entries]) == sum(p.numel() for p in adapter.parameters())
    ((_, _, delta),) = adapter.entries
    made: Any = delta
    want = reference.lstm(bench.parts_of(adapter, {})[0])
    assert bench.close(made.made(), want) <= 1e-5
    adapter.finish()
    assert [n for n, _ in made.named_parameters()] == ["P"]
    assert bench.close(made.P, want) <= 1e-5
