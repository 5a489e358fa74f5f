"""Text noise: the same for everyone, growing with severity, never an empty text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate import tiny
from peftree.probes import run_probes
from peftree.probes.noise import KINDS, LETTERS, NEIGHBOURS, WORDS, damage, damaged

TEXT = "The quick brown fox jumps over the lazy dog, and 7 other foxes watch it do so."
LETTER_KINDS = ("swap", "delete", "insert", "mistype")


def distance(a: str, b: str) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_fixed_by_index_kind_and_severity(kind: str) -> None:
    first = [damage(TEXT, kind, s, 3) for s in range(5)]
    assert first == [damage(TEXT, kind, s, 3) for s in range(5)]
    assert first != [damage(TEXT, kind, s, 4) for s in range(5)]
    assert len({damage(TEXT, k, 4, 3) for k in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_grows_with_severity(kind: str) -> None:
    for index in range(5):
        far = [distance(TEXT, damage(TEXT, kind, s, index)) for s in range(5)]
        assert far == sorted(far) and far[4] > far[0]


def test_the_share_that_is_hit() -> None:
    """Exact on average, a long or a short text alike."""
    for text in (TEXT, "a few words more"):
        letters, words = sum(c.isalnum() for c in text), len(text.split())
        for severity, (share, part) in enumerate(zip(LETTERS, WORDS, strict=True)):
            noisy = {kind: [damage(text, kind, severity, i) for i in range(400)] for kind in KINDS}
            changes = [sum(a != b for a, b in zip(text, typed, strict=True)) for typed in noisy["mistype"]]
            hits = {
                "delete": len(text) - np.mean([len(t) for t in noisy["delete"]]),
                "insert": np.mean([len(t) for t in noisy["insert"]]) - len(text),
                "mistype": np.mean(changes),
            }
            for kind, hit in hits.items():
                assert hit == pytest.approx(share * letters, abs=0.08), (kind, severity)
            dropped = words - np.mean([len(t.split()) for t in noisy["drop_word"]])
            doubled = np.mean([len(t.split()) for t in noisy["double_word"]]) - words
            assert dropped == pytest.approx(part * words, abs=0.08) and doubled == pytest.approx(part * words, abs=0.08)


def test_what_each_kind_does() -> None:
    typed = damage(TEXT, "mistype", 4, 0)
    for a, b in zip(TEXT, typed, strict=True):
        assert a == b or (b.lower() in NEIGHBOURS[a.lower()] and a.isupper() == b.isupper())
    assert sorted(damage(TEXT, "swap", 4, 0)) == sorted(TEXT)
    kept = iter(TEXT)
    assert all(c in kept for c in damage(TEXT, "delete", 4, 0))
    assert set("qwsx") <= set(NEIGHBOURS["a"] + "x") and "p" not in NEIGHBOURS["a"]


@settings(max_examples=60)
@given(st.text(max_size=40), st.sampled_from(sorted(KINDS)), st.integers(0, 4))
def test_no_text_becomes_empty(text: str, kind: str, severity: int) -> None:
    noisy = damage(text, kind, severity, 0)
    assert bool(noisy.strip()) == bool(text.strip())


def test_little_texts_stay() -> None:
    for kind in KINDS:
        for text in ("", " ", "a", "?!", "日"):
            assert damage(text, kind, 4, 0) == text
    assert damage("word", "drop_word", 4, 0) == "word"
    assert damage("日本語", "mistype", 4, 0) == "日本語"


def test_the_sign_of_the_drop() -> None:
    kinds = {"a": [0.5] * 5, "b": [0.3] * 5}
    found = damaged("accuracy", 0.8, True, kinds, 1)
    assert found.severities == pytest.approx([0.4] * 5) and found.drop == pytest.approx(0.4)
    assert damaged("perplexity", 0.3, False, kinds, 1).drop == pytest.approx(0.1)


def test_methods_see_the_same_texts(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    for method in ("lora", "bitfit"):
        subject = tiny.subject("bert_cls", method, tmp_path)
        texts: list[str] = []
        score = subject.score

        def listen(rows: object, texts: list[str] = texts, score: object = score) -> object:
            texts += [r.source for r in rows]  # type: ignore[attr-defined]
            return score(rows)  # type: ignore[operator]

        object.__setattr__(subject, "score", listen)
        found = run_probes(subject, {"noise": {"limit": 5}})["noise"]
        seen.append(texts)
    assert seen[0] == seen[1] and len(seen[0]) == len(set(seen[0])) > 5 * len(KINDS)
    kinds = found["kinds"]
    assert isinstance(kinds, dict) and list(kinds) == list(KINDS) and found["items"] == 5


@pytest.mark.parametrize("base", ["bert_cls", "llama"])
def test_scores_are_those_of_the_damaged_rows(base: str, tmp_path: Path) -> None:
    subject = tiny.subject(base, "lora", tmp_path, moved=0.3)
    found: Any = run_probes(subject, {"noise": {"limit": 0}})["noise"]
    assert found["clean"] == pytest.approx(subject.score(subject.rows).score)
    for kind in ("swap", "drop_word"):
        rows = [r._replace(source=damage(r.source, kind, 4, i)) for i, r in enumerate(subject.rows)]
        assert found["kinds"][kind][4] == pytest.approx(subject.score(rows).score)
