"""CUDA's caching allocator by its rules: sizes of segments, what is split and joined, what a step reserves."""

from __future__ import annotations

import itertools
import random

import pytest

from peftree.plan.ledger import Timeline
from peftree.plan.reserved import WORKSPACE, Allocator, Beside, adamw, reserved

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (100 * MIB + 1, 102 * MIB),
    ],
)
def test_a_segment_has_the_stated_size(size: int, segment: int) -> None:
    memory = Allocator()
    memory.take(size)
    assert memory.reserved == memory.peak == segment


def test_small_tensors_share_a_segment_until_it_is_full() -> None:
    memory = Allocator()
    for _ in range(4096):
        memory.take(100)  # 512 bytes each
    assert memory.reserved == 2 * MIB
    memory.take(1)
    assert memory.reserved == 4 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    memory = Allocator()
    large, small = memory.take(40 * MIB), memory.take(30 * MIB)
    memory.give(large)
    memory.give(small)
    assert memory.take(28 * MIB) == small
    assert memory.take(28 * MIB) == large
    assert memory.reserved == 70 * MIB


@pytest.mark.parametrize(("rest", "more"), [(MIB, 20), (2 * MIB, 0)])
def test_a_large_block_is_split_only_if_over_one_mebibyte_is_left(rest: int, more: int) -> None:
    memory = Allocator()
    memory.give(memory.take(20 * MIB))
    memory.take(20 * MIB - rest)
    memory.take(MIB + 512)  # fits into what a split leaves
    assert memory.reserved == (20 + more) * MIB


def test_free_neighbours_become_one_block() -> None:
    memory = Allocator()
    memory.give(memory.take(60 * MIB))
    first, second, third = (memory.take(20 * MIB) for _ in range(3))
    for address in (first, third, second):
        memory.give(address)
    assert memory.take(60 * MIB) == first
    assert memory.reserved == 60 * MIB


def test_emptying_returns_only_segments_that_are_wholly_free() -> None:
    memory = Allocator()
    kept, gone = memory.take(12 * MIB), memory.take(16 * MIB)
    memory.give(memory.take(6 * MIB))  # a whole segment of 20 MiB
    memory.give(gone)
    memory.empty()
    assert (memory.reserved, memory.peak) == (12 * MIB, 48 * MIB)
    memory.give(kept)
    memory.empty()
    assert memory.reserved == 0


def test_blocks_never_overlap_and_all_memory_comes_back() -> None:
    drawn, memory, live = random.Random(0), Allocator(), {}
    for _ in range(3000):
        if live and drawn.random() < 0.48:
            memory.give(live.popitem()[0] if drawn.random() < 0.5 else _any(live, drawn))
        else:
            size = int(10 ** drawn.uniform(1, 8))
            live[memory.take(size)] = size
        ends = sorted((a, a + s) for a, s in live.items())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
        assert sum(live.values()) <= memory.reserved <= memory.peak
    for address in live:
        memory.give(address)
    memory.empty()
    assert memory.reserved == 0


def _any(live: dict[int, int], drawn: random.Random) -> int:
    address = drawn.choice(list(live))
    del live[address]
    return address


def line(*events: tuple[int, int, int]) -> Timeline:
    """Return a timeline of (owner, change, phase)."""
    owner, change, phase = (list(column) for column in zip(*events, strict=True))
    return Timeline(owner, change, phase, ["forward", "backward"])


STEP = line((0, 100 * MIB, 0), (1, 40 * MIB, 0), (2, 30 * MIB, 1), (1, -40 * MIB, 1))  # outputs, activation, gradient
SHORT = line((0, 90 * MIB, 0), (1, 50 * MIB, 0), (2, 30 * MIB, 1), (1, -50 * MIB, 1))
WEIGHTS, OWN = 200 * MIB, 2 * 20 * MIB  # two workspaces, each in a segment of its own


def test_a_step_reserves_weights_workspaces_and_what_it_holds() -> None:
    assert WORKSPACE == 8320 * KIB
    one = reserved([STEP], Beside(WEIGHTS))
    assert one == WEIGHTS + OWN - 20 * MIB + 170 * MIB  # both workspaces fit into one segment of 20 MiB


def test_outputs_of_a_step_live_through_the_next_forward_pass_and_gradients_do_not() -> None:
    """The second step wants 100 MiB for outputs while the first's are held: a new segment; its gradient needs none."""
    one, two, three = (reserved([STEP] * n, Beside(WEIGHTS)) for n in (1, 2, 3))
    assert two == one + 100 * MIB
    assert three == two


def test_an_emptied_cache_makes_room() -> None:
    state = {"state": [64 * MIB], "scratch": []}
    kept, emptied = (reserved([SHORT, STEP], Beside(WEIGHTS, **state), emptied=after) for after in ((), (0,)))
    assert kept - emptied == 10 * MIB


def test_the_optimizer_takes_its_state_once_and_its_temporary_in_every_step() -> None:
    assert adamw([5, 7]) == {"state": [5, 5, 7, 7], "scratch": [5, 7]}
    plain = reserved([STEP], Beside(WEIGHTS))
    full = reserved([STEP], Beside(WEIGHTS, **adamw([90 * MIB])))
    assert full == plain + 3 * 90 * MIB
