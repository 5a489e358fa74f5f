"""Text noise: letters swapped, deleted, inserted or mistyped, words dropped or doubled, at five severities."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from peftree.evaluate.subject import TEXTS, Number, Result, Subject, some
from peftree.probes import Probe, Scale, Sheet
from peftree.table import Cell, Head, number
from peftree.text import clean, score

LETTERS = (0.02, 0.05, 0.10, 0.15, 0.25)  # share of a text's letters and digits that are hit, by severity
WORDS = (0.05, 0.10, 0.20, 0.30, 0.45)  # the same of its words
_KEYS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SEVERITIES = 5
Levels = Annotated[tuple[FiniteFloat, ...], Field(min_length=SEVERITIES, max_length=SEVERITIES)]


class Damaged(Result):
    """Scores on damaged inputs by `kinds` of damage, from mild to severe, with means over the kinds.

    `clean`: the score on the same undamaged rows; `drop`: how much worse the mean over kinds and severities is, in
    units of the metric, positive if damage harms.
    """

    clean: FiniteFloat
    severities: Levels
    kinds: Annotated[dict[str, Levels], Field(min_length=1)]
    drop: FiniteFloat
    metric: str
    items: Number


def damaged(
    metric: str, whole: float, higher_is_better: bool, kinds: Mapping[str, Sequence[float]], items: int
) -> Damaged:
    """Return the scores `kinds`, by severity, with their means."""
    severities = tuple(sum(column) / len(column) for column in zip(*kinds.values(), strict=True))
    change = whole - sum(severities) / len(severities)
    return Damaged.model_validate({
        "clean": whole, "severities": severities, "kinds": kinds, "drop": change if higher_is_better else -change,
        "metric": metric, "items": items,
    })  # fmt: skip


def robustness(what: str) -> Sheet:
    """Return the table of robustness to `what`."""
    heads = (
        Head("Clean", "The score on the same items, undamaged."),
        *(Head(f"Severity {level}") for level in range(1, SEVERITIES + 1)),
        Head("Mean loss", "Clean minus the mean over severities, positive where damage harms."),
        Head("Worst kind", "The kind of damage that harms most.", numeric=False),
    )
    caption = "{metric}; means over the kinds of damage and the seeds."
    return Sheet(f"Robustness to {what}", caption, heads, _cells)


def _cells(found: Damaged, scale: Scale) -> list[Cell]:
    lost = {kind: scale.sign * (found.clean - sum(s) / len(s)) for kind, s in found.kinds.items()}
    worst = max(lost, key=lambda kind: lost[kind])
    scores = (number(value, scale.decimals) for value in (found.clean, *found.severities))
    last = Cell(clean(worst), f"loses {score(lost[worst], scale.decimals)}", worst)
    return [*scores, number(found.drop, scale.decimals, signed=True), last]


class Noise(Probe):
    """How far does the score fall when letters or words of the texts are damaged?"""

    name = "noise"
    tasks = TEXTS
    result = Damaged
    order = 1
    sheet = robustness("text noise")
    limit: int = Field(48, ge=0, description="rows, evenly spread; 0: all")

    def measure(self, subject: Subject) -> Result:
        """Score the model on damaged texts (prompts, if it completes them); targets stay the same.

        What is damaged depends only on the row's index, the kind and the severity, so it is the same for every method
        and seed; a higher severity keeps the damage of the lower ones and adds to it. A short text may stay whole at a
        low severity: over many texts the shares are those of `LETTERS` and `WORDS`.
        """
        from peftree.evaluate.quality import aggregated

        chosen = some(subject.rows, self.limit)
        texts = {
            (kind, severity): [damage(row.source, kind, severity, index) for index, row in chosen]
            for kind in KINDS
            for severity in range(SEVERITIES)
        }
        clean = [row.source for _, row in chosen]
        # Every text is scored once, the variants of a row side by side, which pads least.
        variants = [dict.fromkeys([whole, *column]) for whole, *column in zip(clean, *texts.values(), strict=True)]
        rows = [row._replace(source=text) for (_, row), each in zip(chosen, variants, strict=True) for text in each]
        scores = subject.score(rows)
        items = iter(scores.items)
        known = [{text: next(items) for text in each} for each in variants]

        def total(column: list[str]) -> float:
            return aggregated([item[text] for item, text in zip(known, column, strict=True)], scores.aggregate)

        kinds = {kind: [total(texts[kind, severity]) for severity in range(SEVERITIES)] for kind in KINDS}
        return damaged(scores.metric, total(clean), scores.higher_is_better, kinds, len(chosen))


def damage(text: str, kind: str, severity: int, index: int) -> str:
    """Return `text` with noise.

    Args:
        text: any text; a text with no letter or word to spare comes back unchanged.
        kind: one of `KINDS`.
        severity: 0 to 4.
        index: number of the row, which with `kind` seeds the noise.
    """
    draw = np.random.default_rng([index, list(KINDS).index(kind)])
    return KINDS[kind](text, severity, draw)


def _neighbours() -> dict[str, str]:
    """Return the keys next to each key of a QWERTY keyboard; a row is half a key to the right of the one above."""
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
    """Return noise that applies `change(characters, place, u)` at random places that fit; u is uniform in [0, 1)."""

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
    """Return noise that replaces random words by `change(word)` and keeps white space."""

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
