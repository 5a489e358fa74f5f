"""The whole course of a step from few layers: what does not repeat is not extended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from peftree.plan import repeat
from peftree.plan.ledger import Timeline
from peftree.plan.skeleton import Depth
from peftree.plan.step import Traced

DEPTH = Depth("", "num_hidden_layers", 10, 1)


def turns(*changes: int) -> Any:
    """Return turns of activations."""
    found = np.zeros((len(changes), 4), dtype=np.int64)
    found[:, 1] = changes
    return {"forward": found}


def test_a_layer_is_put_in_where_the_deeper_course_has_it() -> None:
    one, two = turns(5, -1, 8, -2, 3), turns(5, -1, 8, -2, 8, -2, 3)
    assert np.array_equal(repeat.extended(one, two, 3)["forward"], turns(5, -1, *(8, -2) * 4, 3)["forward"])
    assert repeat.peaks(repeat.extended(one, two, 3))["forward"]["activations"] == 4 + 3 * 6 + 8 - 2 + 3


@pytest.mark.parametrize("deeper", [(5, -1, 8, -2, 8, -2, 4), (5, -1, 8), (6, -1, 8, -2, 3)])
def test_another_course_is_not_extended(deeper: tuple[int, ...]) -> None:
    assert repeat.extended(turns(5, -1, 8, -2, 3), turns(*deeper), 2) is None


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_three_depths_must_agree(odd: int) -> None:
    """`odd`: nothing, a release, or operations of the third depth are not as two depths say."""

    def run(counts: Mapping[Depth, int]) -> Traced:
        layers = counts[DEPTH]
        change = [16, *[8, -2] * layers, -4 - (odd == 1 and layers == 5)]
        line = Timeline(list(range(len(change))), change, [0] * len(change), ["forward"], [abs(c) for c in change])
        line.shape = [()] * len(change)
        return Traced({}, {"forward": 10 * layers + (odd == 2 and layers == 5)}, line, 0)

    found = repeat.told(run, {DEPTH: 2})
    if odd:
        assert found is None
    else:
        assert found is not None and found[0]["forward"]["temporaries"] == 16 + 9 * 6 + 8 and found[1] == 100
    assert repeat.told(run, {DEPTH: 2, Depth("x", "n", 10, 1): 2}) is None
