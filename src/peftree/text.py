"""Text for every output: control characters made visible, numbers in the form people read."""

from __future__ import annotations

import math
import unicodedata

NONE = "–"
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
TERMINAL_BREAKS = str.maketrans({"\n": " ", "\t": " "})


def clean(text: str, *, lines: bool = False, limit: int = 400) -> str:
    """Return `text` with terminal escapes, control and direction characters spelled out.

    Line breaks and tabs are kept if `lines`, else they become spaces. Text longer than `limit`
    characters is cut in the middle, because errors say most at their ends.
    """
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} ... {text[-half:]}"
    text = text.replace("\r\n", "\n")
    if not lines:
        text = text.translate(TERMINAL_BREAKS)
    kept = "\n\t" if lines else ""
    return "".join(char if char in kept or unicodedata.category(char) not in HIDDEN else _spell(char) for char in text)


def _spell(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def count(number: float | None) -> str:
    """Return a count with at most three digits and a unit: 950, 12.3k, 4.56M, 1.10G."""
    if number is None:
        return NONE
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:
            return f"{_three(number / size)}{unit}"
    return f"{number:.0f}"


def size(number: float | None) -> str:
    """Return bytes in binary units: 512 B, 12.3 KiB, 4.56 MiB, 1.10 GiB."""
    if number is None:
        return NONE
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 2**power * 0.9995:
            return f"{_three(number / 2**power)} {unit}"
    return f"{number:.0f} B"


def _three(number: float) -> str:
    if number >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def seconds(number: float | None) -> str:
    """Return a duration: 45 ms, 3.2 s, 2 min 05 s, 1 h 20 min."""
    if number is None:
        return NONE
    if number < 0.9995:
        return f"{number * 1000:.3g} ms"
    if number < 99.95:
        return f"{number:.3g} s"
    whole = round(number)
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(part: float | None) -> str:
    """Return a share as a percentage with two or three significant digits."""
    if part is None:
        return NONE
    value = part * 100
    if abs(value) >= 9.995:
        return f"{value:.0f} %".replace("-", "−")
    return f"{value:.2g} %".replace("-", "−")


def digits(scores: list[float]) -> int:
    """Return how many decimals suit these scores: 3 up to about 1, then 2, then 1."""
    largest = max((abs(score) for score in scores), default=1.0)
    return 3 if largest < 2 else 2 if largest < 50 else 1


def score(value: float | None, decimals: int, *, signed: bool = False) -> str:
    """Return a score with a fixed number of decimals and a true minus sign."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:+.{decimals}f}" if signed else f"{value:.{decimals}f}"
    if not float(text):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def plural(number: int, noun: str) -> str:
    """Return ``1 run`` or ``3 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def join(words: list[str]) -> str:
    """Return ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
