"""How close written texts are to their references: exact match, ROUGE-L, chrF."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ORDER, BETA = 6, 2  # chrF2: character n-grams of 1 to 6, recall counts four times as much as precision


def compare(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return `exact` (share of equal texts, 0..1), `rouge_l` (mean, 0..1) and `chrf` (of the whole, 0..100).

    Outer white space does not count. There must be one reference per text, and at least one text.
    """
    pairs = [(text.strip(), reference.strip()) for text, reference in zip(texts, references, strict=True)]
    return {
        "exact": float(np.mean([text == reference for text, reference in pairs])),
        "rouge_l": float(np.mean([rouge_l(text, reference) for text, reference in pairs])),
        "chrf": chrf([text for text, _ in pairs], [reference for _, reference in pairs]),
    }


def rouge_l(text: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words (Lin 2004), 0..1; words are lower-case a-z and 0-9."""
    one, two = (re.findall("[a-z0-9]+", side.lower()) for side in (text, reference))
    if not one or not two:
        return 0.0
    return 2 * _longest_common(one, two) / (len(one) + len(two))


def _longest_common(one: Sequence[str], two: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(two) + 1)
    for word in one:
        before = row
        row = [0]
        for j, other in enumerate(two, 1):
            row.append(before[j - 1] + 1 if word == other else max(before[j], row[-1]))
    return row[-1]


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """Return chrF2 of a whole set (Popovic 2015), 0..100, as sacreBLEU's `chrF2|nc:6|nw:0|space:no` counts it.

    Character n-grams are counted over all texts, without white space. Precision and recall are means
    over the orders that both sides have.
    """
    made, wanted, both = (np.zeros(ORDER) for _ in range(3))
    for text, reference in zip(texts, references, strict=True):
        for n in range(ORDER):
            one, two = _grams(text, n + 1), _grams(reference, n + 1)
            made[n] += one.total() if two else 0  # what has no counterpart of its length is not judged
            wanted[n] += two.total()
            both[n] += (one & two).total()
    kept = (made > 0) & (wanted > 0)
    if not both[kept].any():
        return 0.0
    precision, recall = float((both[kept] / made[kept]).mean()), float((both[kept] / wanted[kept]).mean())
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    joined = "".join(text.split())
    return Counter(joined[i : i + n] for i in range(len(joined) - n + 1))
