"""Text noise: letters swapped, deleted, inserted or mistyped, words dropped or doubled, at five severities."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np

from peftree.evaluate.settings import Noise
from peftree.evaluate.subject import Result, Subject, not_measured, some

LETTERS = (0.02, 0.05, 0.10, 0.15, 0.25)  # share of a text's letters and digits that are hit, by severity
WORDS = (0.05, 0.10, 0.20, 0.30, 0.45)  # the same of its words
_KEYS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def noise(subject: Subject, settings: Noise) -> Result:
    """Score the model on damaged texts (prompts, where it completes them); targets stay.

    What is damaged depends on the row's index, the kind and the severity alone, so it is the same for every method
    and seed; a higher severity keeps the damage of the lower ones and adds to it. A short text may stay whole at a
    low severity: over many texts the shares are those of `LETTERS` and `WORDS`.

    Returns:
        `metric`, `items`, `clean`: the score on the same rows unharmed; `kinds`: kind -> five scores, from mild to
        severe; `severities`: their means over the kinds; `drop`: mean over kinds and severities of how much worse
        than `clean`, in units of the metric, positive where noise harms.
    """
    chosen = some(subject.rows, settings.limit)
    if not chosen:
        return not_measured("There are no test rows.")
    texts = {
        (kind, severity): [damage(row.source, kind, severity, index) for index, row in chosen]
        for kind in KINDS
        for severity in range(5)
    }
    clean = [row.source for _, row in chosen]
    # Every text is scored once, the variants of a row side by side, which pads least.
    variants = [dict.fromkeys([whole, *column]) for whole, *column in zip(clean, *texts.values(), strict=True)]
    rows = [row._replace(source=text) for (_, row), each in zip(chosen, variants, strict=True) for text in each]
    scores = subject.score(rows)
    items = iter(scores.items)
    known = [{text: next(items) for text in each} for each in variants]

    def total(column: list[str]) -> float:
        mean = float(np.mean([item[text] for item, text in zip(known, column, strict=True)]))
        return mean if scores.aggregate == "mean" else math.exp(min(mean, 700.0))

    kinds = {kind: [total(texts[kind, severity]) for severity in range(5)] for kind in KINDS}
    return summary(scores.metric, total(clean), scores.higher_is_better, kinds) | {"items": len(chosen)}


def summary(metric: str, clean: float, higher_is_better: bool, kinds: dict[str, list[float]]) -> Result:
    """Return scores by kind and severity with their means; `drop` is positive where the damage harms."""
    severities = [float(np.mean(column)) for column in zip(*kinds.values(), strict=True)]
    change = clean - float(np.mean(severities))
    return {
        "metric": metric, "clean": clean, "severities": severities, "kinds": kinds,
        "drop": change if higher_is_better else -change,
    }  # fmt: skip


def damage(text: str, kind: str, severity: int, index: int) -> str:
    """Return `text` with noise.

    Args:
        text: any text; what has no letter or word to spare comes back as it is.
        kind: one of `KINDS`.
        severity: 0 to 4.
        index: number of the row, which with `kind` seeds the noise.
    """
    draw = np.random.default_rng([index, list(KINDS).index(kind)])
    return KINDS[kind](text, severity, draw)


def _neighbours() -> dict[str, str]:
    """Return the keys beside each key of a QWERTY keyboard; a row stands half a key right of the one above."""
    place = {key: (row, column + row / 2) for row, keys in enumerate(_KEYS) for column, key in enumerate(keys)}
    return {
        key: "".join(k for k, (r, c) in place.items() if k != key and abs(r - row) <= 1 and abs(c - column) <= 1)
        for key, (row, column) in place.items()
    }


NEIGHBOURS = _neighbours()


def _hit(places: list[int], share: float, draw: np.random.Generator) -> list[int]:
    """Return that share of `places`, rounded at random and never all, from an order that is the same for all shares."""
    order, count = draw.permutation(len(places)), int(share * len(places) + draw.random())
    return [places[i] for i in order[: min(count, len(places) - 1)]]


Noisy = Callable[[str, int, np.random.Generator], str]


def _letters(change: Callable[[list[str], int, float], None], fits: Callable[[str, int], bool]) -> Noisy:
    """Return noise that lets `change(characters, place, u)` act at random places that fit; u is uniform in [0, 1)."""

    def noisy(text: str, severity: int, draw: np.random.Generator) -> str:
        out = list(text)
        places = [i for i, character in enumerate(text) if character.isalnum() and fits(text, i)]
        if len(places) < 2:
            return text
        values = draw.random(len(text))
        for place in _hit(places, LETTERS[severity], draw):
            change(out, place, values[place])
        return "".join(out)

    return noisy


def _swap(out: list[str], place: int, u: float) -> None:
    out[place], out[place + 1] = out[place + 1], out[place]


def _delete(out: list[str], place: int, u: float) -> None:
    out[place] = ""


def _insert(out: list[str], place: int, u: float) -> None:
    out[place] += _ALPHABET[int(u * len(_ALPHABET))]


def _mistype(out: list[str], place: int, u: float) -> None:
    near = NEIGHBOURS[out[place].lower()]
    key = near[int(u * len(near))]
    out[place] = key.upper() if out[place].isupper() else key


def _words(change: Callable[[str], str]) -> Noisy:
    """Return noise that puts `change(word)` for random words, white space staying as it is."""

    def noisy(text: str, severity: int, draw: np.random.Generator) -> str:
        parts = re.split(r"(\s+)", text)
        places = [i for i, part in enumerate(parts) if part and not part.isspace()]
        if len(places) < 2:
            return text
        for place in _hit(places, WORDS[severity], draw):
            parts[place] = change(parts[place])
        return "".join(parts)

    return noisy


KINDS: dict[str, Noisy] = {
    "swap": _letters(_swap, lambda text, i: text[i + 1 : i + 2].isalnum()),
    "delete": _letters(_delete, lambda text, i: True),
    "insert": _letters(_insert, lambda text, i: True),
    "mistype": _letters(_mistype, lambda text, i: text[i].lower() in NEIGHBOURS),
    "drop_word": _words(lambda word: ""),
    "double_word": _words(lambda word: f"{word} {word}"),
}
