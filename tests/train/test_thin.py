"""Fewer training rows and wrong labels: what the study's curves over data and noise rest on."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from peftree.data.rows import Data, Example, load_data
from peftree.data.thinning import thinned
from peftree.errors import ConfigError
from peftree.settings import load_config
from peftree.train.run import run
from train.tiny import write_csv

SHARES = (0.05, 0.1, 0.3, 0.5, 0.9)


def rows(n: int, classes: str = "aaabbc") -> tuple[Example, ...]:
    return tuple(Example(f"text {i}", classes[i % len(classes)], f"a.csv:{i + 2}") for i in range(n))


@pytest.fixture
def data() -> Data:
    return Data("text-classification", rows(120), rows(6), rows(6), ("a", "b", "c"))


@pytest.mark.parametrize("share", SHARES)
def test_every_class_keeps_its_share(data: Data, share: float) -> None:
    found = thinned(data, share)
    counts = Counter(row.target for row in found.train)
    assert counts == {label: max(1, round(share * n)) for label, n in (("a", 60), ("b", 40), ("c", 20))}
    assert len(set(found.train)) == len(found.train) and set(found.train) < set(data.train)
    assert list(found.train) == [row for row in data.train if row in set(found.train)]  # in the order of the file
    assert (found.valid, found.test, found.labels) == (data.valid, data.test, data.labels)


def test_smaller_shares_lie_within_larger_ones_and_repeat(data: Data) -> None:
    parts = [set(thinned(data, share).train) for share in SHARES]
    assert all(small < large for small, large in itertools.pairwise(parts))
    assert thinned(data, 0.3) == thinned(data, 0.3)
    assert thinned(data) == data


def test_a_rare_class_keeps_a_row(data: Data) -> None:
    rare = Data(data.task, (*rows(60, "ab"), Example("x", "c", "")), data.valid, data.test, data.labels)
    assert Counter(row.target for row in thinned(rare, 0.1).train) == {"a": 3, "b": 3, "c": 1}
    plain = Data("generation", rows(50), rows(5), (), ())
    assert len(thinned(plain, 0.2).train) == 10


@pytest.mark.parametrize("noise", [0.05, 0.25, 0.5, 1.0])
def test_noise_makes_that_many_labels_wrong(data: Data, noise: float) -> None:
    found = thinned(data, label_noise=noise)
    wrong = [(old, new) for old, new in zip(data.train, found.train, strict=True) if old.target != new.target]
    assert len(wrong) == round(noise * 120)  # none of the drawn rows keeps its right label
    assert all(old._replace(target=new.target) == new and new.target in data.labels for old, new in wrong)
    assert (found.valid, found.test) == (data.valid, data.test)
    if noise == 1:  # the other classes are drawn evenly
        drawn = Counter((old.target, new.target) for old, new in wrong)
        assert len(drawn) == 6 and min(drawn.values()) >= 5


def test_noise_falls_on_the_rows_that_are_left(data: Data) -> None:
    kept, noisy = thinned(data, 0.5), thinned(data, 0.5, 0.2)
    assert [row.source for row in noisy.train] == [row.source for row in kept.train]
    assert sum(a.target != b.target for a, b in zip(kept.train, noisy.train, strict=True)) == 12


def test_noise_needs_classes() -> None:
    with pytest.raises(ConfigError, match=r"label_noise=0\.1: the task generation has no classes.*label_noise: 0"):
        thinned(Data("generation", rows(9), (), (), ()), label_noise=0.1)


@pytest.mark.slow
def test_a_run_trains_on_the_share_and_the_wrong_labels(encoder: str, review_data: Path, tmp_path: Path) -> None:
    settings = [f"model={encoder}", f"data={review_data}", "quiet=true", "base_score=false", "save_every=0", "lr=0.01"]
    half = run(load_config(None, [*settings, f"output={tmp_path / 'half'}", "steps=1", "data.share=0.5"]))
    assert half.n_train == 24
    # Of two classes all labels wrong is the task turned round: what is learned is wrong on clean rows.
    turned = run(
        load_config(
            None, [*settings, f"output={tmp_path / 'turned'}", "steps=40", "data.label_noise=1", "eval_every=0"]
        )
    )
    assert turned.score < 0.3


def test_a_hold_out_leaves_every_class_its_only_row(tmp_path: Path) -> None:
    once = [("only one", "rare")]
    path = write_csv(tmp_path / "a.csv", [*((f"text {i}", "ab"[i % 2]) for i in range(40)), *once])
    for seed in range(5):
        data = load_data(path, seed=seed)
        assert [row.source for row in data.train if row.target == "rare"] == ["only one"]
        assert Counter(row.target for row in data.valid) == {"a": 2, "b": 2}
