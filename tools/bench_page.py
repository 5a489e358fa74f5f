"""The benchmark's page: `python -m tools.bench_page` makes docs/bench.md and its figures from docs/bench.json alone.

The JSON holds a record for each section of benchmarks/sections.yaml: its rows, when, where and how they were measured,
and the hash of the code that they depend on. `outdated` says which sections the code has left behind, `faults` whether
rows that were measured again confirm stored ones. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tools import figure, hot_code

from peftree import text
from peftree.files import atomic_write

ROOT = Path(__file__).parents[1]
DOCS, SECTIONS = ROOT / "docs", ROOT / "benchmarks" / "sections.yaml"
DATA, PAGE = DOCS / "bench.json", DOCS / "bench.md"
Row = dict[str, Any]
Record = dict[str, Any]
HEAD = """# Time and memory beside Hugging Face PEFT

Made by `make bench-page` from [bench.json](bench.json): do not edit. `make bench` measures all sections that the code
has left behind, `make bench SECTION=name` one of them; `make bench-confirm` measures a few rows again after a change of
the code that should not change the figures ([decision 0047](decisions/0047-one-page.md)).

Same weights, same batches, one thread of a CPU, process CPU time. In every round each variant runs once, in rotated
order; a ratio is taken within a round, and stated as `median (quartiles)` over the rounds. Unless a column says
otherwise it is peftree / PEFT: below 1 is less. *Noise* is a second copy of PEFT's model over the first, in the same
rounds: a ratio within its quartiles does not show a difference. Bytes are exact: what the graph keeps for the backward
pass, parameters left out, and the peak of the allocator in a step.

Elsewhere: [planned and measured memory](plan-truth.md), [whole studies](study.md), and, for a machine with a GPU, `make
bench-gpu`, which was not run on one yet.
"""
PROCESSOR = ("cpu", "vectors")  # facts of a machine that its ratios need not depend on
AXES = {"tokens": "tokens in a text", "layers": "layers", "adapters": "adapters attached"}
SMALL = "Tried with one layer and 1 x 16 tokens, which shows that it runs, not how fast. Run `make bench`."
UNMEASURED = "not measured with this code yet: run `make bench`"
SIDES = (("peftree", "reparameterized"), ("peft", "selective"))
LINK = "[side-by-side measurements](docs/bench.md)"
LOSS = "its loss without whole logits, as in `peftree train`"
LABELS = {"peftree": "peftree", "peft": "PEFT"}


class Section(NamedTuple):
    """One section as benchmarks/sections.yaml states it.

    `confirm` are the rows that are measured again to confirm it, `ratio` the value in them that is a ratio of times.
    """

    title: str
    command: str
    rounds: int
    seconds: int
    about: str
    columns: dict[str, str]
    confirm: tuple[str, ...] = ()
    ratio: str = "peftree"
    code: tuple[str, ...] = hot_code.FOLDERS


@cache
def stated() -> tuple[dict[str, Section], list[dict[str, str]]]:
    """Return the sections by name and the results that were no gain."""
    found = yaml.safe_load(SECTIONS.read_text("utf-8"))
    tuples = ("confirm", "code")
    made = {}
    for name, each in found["sections"].items():
        fields: dict[str, Any] = {key: tuple(held) if key in tuples else held for key, held in each.items()}
        made[name] = Section(**fields)
    return made, found["negative"]


def load() -> dict[str, Record]:
    """Return the stored records by section."""
    found: dict[str, Record] = json.loads(DATA.read_text("utf-8"))["sections"] if DATA.is_file() else {}
    return found


def dump(data: dict[str, Record]) -> str:
    """Return records as JSON, one row a line, in the order of the sections."""
    parts = []
    for name in (n for n in stated()[0] if n in data):
        rows = ",\n".join(json.dumps(row) for row in data[name]["rows"])
        facts = json.dumps({k: v for k, v in data[name].items() if k != "rows"})[:-1]
        parts.append(f'"{name}": {facts}, "rows": [\n{rows}\n]}}')
    return '{"sections": {\n' + ",\n".join(parts) + "\n}}\n"


def outdated(data: dict[str, Record], package: Path = hot_code.PACKAGE) -> dict[str, str]:
    """Return why each section does not hold for the code, and what to run; those that hold are left out."""
    found, sections = {}, stated()[0]
    hashes = {code: hot_code.digest(code, package) for code in {section.code for section in sections.values()}}
    for name, section in sections.items():
        now = hashes[section.code]
        if name not in data:
            found[name] = f"{name}: not measured yet. Run `make bench SECTION={name}`."
        elif data[name]["code"] != now:
            found[name] = (
                f"{name}: measured with other code of {', '.join(section.code)} ({data[name]['code']}, now {now}). Run "
                f"`make bench SECTION={name}`, or, if time and memory should be as before, `make bench-confirm`."
            )
    return found


def faults(section: Section, stored: Record, again: Record) -> list[str]:
    """Return what rows measured again say against the stored ones: bytes that differ, a ratio outside its interval.

    The interval is the quartiles of the stored ratio, wider on both sides by the range of the noise's quartiles, of the
    stored row or the new one, whichever is larger (where no noise was measured, by its own range). A ratio below it is
    a fault as well: the page would understate. Another processor may confirm, if its ratios are the same; bytes are.
    """
    facts, here = stored["machine"], again["machine"]
    others = [f"{k} {facts.get(k)}, here {here[k]}" for k in here if facts.get(k) != here[k] and k not in PROCESSOR]
    if others:
        return [f"measured otherwise: {'; '.join(others)}. Measure the section: `make bench`"]
    old, found = {row["row"]: row for row in stored["rows"]}, []
    for row in again["rows"]:
        before = old[row["row"]]
        found += [
            f"{row['row']}: {key} {before[key]:,}, now {row[key]:,}"
            for key in row
            if key.endswith("_bytes") and row[key] != before.get(key)
        ]
        now, (_, low, high) = row[section.ratio][0], before[section.ratio]
        room = max((r["again"][2] - r["again"][1] for r in (row, before) if "again" in r), default=high - low)
        if not low - room <= now <= high + room:
            found.append(f"{row['row']}: time {now:.3f}, outside {low - room:.3f} to {high + room:.3f}")
    return found


def value(row: Row, key: str) -> Any:
    """Return a value of a row, or the ratio of two, `a / b`; None where one is missing."""
    if " / " not in key:
        return row.get(key)
    one, other = (row.get(part) for part in key.split(" / "))
    return None if one is None or not other else one / other


def cell(key: str, found: Any) -> str:
    """Return a value as text."""
    if found is None:
        return "-"
    if isinstance(found, list):
        median, low, high = found
        return f"{median:.3f} ({low:.3f}-{high:.3f})" if low < high else f"{median:.3f}"
    if isinstance(found, int):
        return text.size(found) if key.endswith("_bytes") else f"{found:,}"
    if isinstance(found, float):
        return f"{found:.3f}" if " / " in key and found >= 0.1 else f"{found:.3g}"
    return str(found)


def table(section: Section, rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    heads, keys = list(section.columns.values()), list(section.columns)
    words = [all(isinstance(row.get(key), str) for row in rows) for key in keys]
    lines = [heads, ["---" if word else "--:" for word in words]]
    lines += [[cell(key, value(row, key)) for key in keys] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def body(name: str, record: Record) -> str:
    """Return one section of the page."""
    section, facts = stated()[0][name], record["machine"]
    where = ", ".join(f"{key} {found}" for key, found in facts.items())
    said = f"`python benchmarks/{section.command} --rounds {record['rounds']}`, {record['date']}, "
    said += f"{text.seconds(record['seconds'])}; {where}; code `{record['code']}`."
    said += f" {record['confirmed']}." if "confirmed" in record else ""
    said += f"\n\n**{SMALL}**" if "small" in record else ""
    out = f"\n## {section.title}\n\n{section.about}\n\n{table(section, record['rows'])}\n{said}\n"
    if name == "growth":
        out += "\n" + " ".join(f"![{AXES[axis]}](bench/{axis}.svg)" for axis in AXES) + "\n"
    missed = [f"* {row['row']}: {row['why']}" for row in record["rows"] if row.get("met") == "missed"]
    return out + ("\nMissed:\n\n" + "\n".join(missed) + "\n" if missed else "")


def page(data: dict[str, Record]) -> str:
    """Return the whole page."""
    sections, negative = stated()
    out = HEAD + "".join(body(name, data[name]) for name in sections if name in data)
    out += "\n## No gain\n\nTried and left out, each in the decision that says so.\n\n"
    return out + "".join(f"* {n['what']}. {n['found']} ([decision](decisions/{n['record']}))\n" for n in negative)


def figures(data: dict[str, Record]) -> dict[str, str]:
    """Return the figures of growth as SVG files, by path below docs/."""
    out = {}
    for axis, across in AXES.items():
        rows = [row for row in data["growth"]["rows"] if row["axis"] == axis]
        drawn = [(LABELS[n], branch, [(float(r["at"]), r[n][0]) for r in rows]) for n, branch in SIDES]
        over = "bare base" if axis == "adapters" else "frozen model's step"
        out[f"bench/{axis}.svg"] = figure.lines(f"Time over the {over}", across, f"time over the {over}", drawn)
    return out


def _row(data: dict[str, Record], section: str, name: str) -> Row:
    return next(row for row in data[section]["rows"] if row["row"] == name)


def said(row: Row, key: str = "peftree") -> str:
    """Say a ratio of times, if it is outside the noise of the same model measured twice."""
    low, high = row["again"][1:]
    return "the same time within noise" if low <= row[key][0] <= high else f"{row[key][0]:.2f} of the time"


def whole(data: dict[str, Record], *names: str) -> bool:
    """Return whether all of these sections were measured, not only tried with small sizes."""
    return not any("small" in data[name] for name in names)


def facts(data: dict[str, Record]) -> str:
    """Return the README's line about a training step."""
    if not whole(data, "whole"):
        return f"{UNMEASURED} ({LINK})"
    words = []
    for name in ("lora", "dora"):
        row = _row(data, "whole", f"{name} all")
        peak = value(row, "chunked peak_bytes / peft peak_bytes")
        words.append(f"{peak:.2f} of the peak memory and {said(row, 'chunked')}")
    return f"LoRA takes {words[0]}; DoRA takes\n  {words[1]}\n  ({LOSS}; {LINK})"


def speed(data: dict[str, Record]) -> str:
    """Return the README's table of time and memory."""
    if not whole(data, "whole", "step", "precision", "rss", "mixed", "operations"):
        return f"(The table is {UNMEASURED}.)"
    lines = [["", "time / PEFT", "peak memory / PEFT"], ["---", "--:", "--:"]]
    steps = (
        ("whole", "lora all", "chunked", f"a step of SmolLM2-135M, LoRA on all linear maps, {LOSS}"),
        ("whole", "dora all", "chunked", "the same, DoRA"),
        ("step", "smol, lora all, dropout .05", "peftree", "its layers alone, LoRA with dropout .05"),
        ("precision", "smol, autocast-bf16, lora all", "peftree", "its layers alone, LoRA under bfloat16 autocast"),
    )
    for section, name, key, what in steps:
        row = _row(data, section, name)
        peak = value(row, f"{key} peak_bytes / peft peak_bytes")
        lines.append([what, cell(key, row[key]), f"{peak:.2f}"])
    rss = _row(data, "rss", "chunked")
    lines.append(["growth of a fresh process in such steps, LoRA", "", f"{rss['share']:.2f}"])
    row = _row(data, "mixed", "32 x 1, 32 adapters")
    lines.append(["32 tokens decoded with 32 adapters", f"{row['mixed'][0] / row['peft'][0]:.2f}", ""])
    for name, what in (("attach one more to 1", "attach an adapter"), ("switch, 64 attached", "switch among 64")):
        row = _row(data, "operations", name)
        lines.append([what, f"{row['peftree'] / row['peft']:.2g}", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loss(data: dict[str, Record]) -> str:
    """Return the paragraph of docs/precision.md about the loss without logits."""
    if not whole(data, "whole", "loss"):
        return f"(Time and memory beside whole logits are {UNMEASURED}.)"
    row, half = _row(data, "whole", "lora all"), _row(data, "loss", "step, half of the tokens")
    scored = [_row(data, "loss", f"scoring, {words}") for words in ("all tokens", "half of the tokens")]

    def told(name: str) -> str:
        peak, saved = (value(row, f"{name} {kind} / peft {kind}") for kind in ("peak_bytes", "saved_bytes"))
        sizes = f"{text.size(row[f'{name} peak_bytes'])} of {text.size(row['peft peak_bytes'])}"
        return f"{row[name][0]:.2f} of the time, {peak:.2f} of the peak ({sizes}), {saved:.2f} of what is saved"

    def score(one: Row) -> str:
        sizes = (text.size(one[f"{name} peak_bytes"]) for name in ("peft", "chunked"))
        return "{} with whole logits and {} without, in {:.2f} of the time".format(*sizes, one["chunked"][0])

    return (
        "SmolLM2-135M, LoRA on all linear maps, 4 x 128 tokens, float32, a label for each token, over Hugging Face\n"
        f"PEFT's step ([measured](bench.md#a-whole-model-with-its-head)):\n\n* with whole logits: {told('peftree')};\n"
        f"* without: {told('chunked')}; with labels for half of the tokens\n  "
        f"{value(half, 'chunked peak_bytes / peft peak_bytes'):.2f} of the peak;\n"
        f"* scoring such a batch with the base: {score(scored[0])};\n"
        f"* with half of the tokens scored: {score(scored[1])}."
    )


def files(data: dict[str, Record]) -> dict[str, str]:
    """Return the page and its figures, by path below docs/."""
    return {PAGE.name: page(data), **figures(data)}


def main() -> None:
    """Write the page and its figures."""
    for name, content in files(load()).items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        atomic_write(DOCS / name, content)


if __name__ == "__main__":
    main()
