"""Measures transformers' classes, writes docs/models.md: `python -m tools.models_page [measure [CLASS ..] | others]`.

Without arguments the page is made from docs/models.json. `measure` measures the classes named, or all that the file
lacks or in which something does not work yet, puts the results into the file, and makes the page; `--again` all,
`--cells=linear,merge` these cells alone. `others` measures the models of other libraries.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
DRAFTS = ROOT / "build" / "models"  # results of a sweep that was cut off: it continues from there
CELLS = {
    "linear": "LoRA on every linear map of the layers (`sites=linear`)",
    "attention": "LoRA on the query and value maps by role (`attn.q attn.v`, or what holds them fused)",
    "prefix": "prefix tuning",
    "tokens": "prompt tuning",
    "side": "a ladder side network (LST)",
    "merge": "merging that LoRA into the weights and taking it out again",
    "plan": "a plan of that LoRA's memory from the config alone",
}
ORDER = ("name", "model_type", "mappings", "state", "unbuilt", "built", "inputs", "interface", "parameters", *CELLS)
Row = dict[str, Any]
HEAD = """# Models

What works on each class of transformers' auto mappings, found by running it: each class is built small from its
default config (its field names say what is a width, a number of layers, of heads, of words), given inputs with which it
runs, and adapted. A cell says **yes** only where all of this holds on that model in float32:

* **linear**, **attention**: switched off, the output is the base's to the bit; switched on, it is that of a bare
  copy into whose weights `W + scale B A` was written, within 1e-4 of the largest value or a thousandth of what the
  adapter changes; the gradient of every factor is the one that the chain rule gives from the gradient of that copy's
  dense weight, within 1 %. A model that magnifies rounding (it takes the largest few of many scores, or is deep) is
  measured in float64 too, where the output is within 1e-9 and the gradient within 1e-6.
* **prefix**, **tokens**, **side**: switched off, the base to the bit; switched on, outputs of the base's shapes with
  other values, and finite gradients. Attention maps have columns for a prefix besides, and the encoder's output of an
  encoder-decoder holds the virtual tokens, which its decoder sees in every later call.
* **merge**: merged and unmerged outputs within 1e-4; after unmerging every weight is the old one to the bit.
* **plan**: the plan is a trace of the model's own code, no rule of thumb.

*refused* is an error of ours that says what is missing; *wrong* a value that is not the right one; *crash* an error
that is not ours. The last two are faults of peftree. *rough*: the model's code looks at the values of tensors, which a
trace does not have: the plan is a rule of thumb, and says so. `-`: the class has no attention, or no linear map but its
head, or its output does not depend on the weights in question: other values in the bare model change nothing.
The reasons stand below the tables. An empty cell was not measured.
"""


def load() -> dict[str, Any]:
    """Return the stored results."""
    found: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"classes": []}
    return found


def dump(results: dict[str, Any]) -> str:
    """Return results as JSON, one class a line."""
    rows = sorted(results["classes"], key=lambda row: row["name"])
    lines = ",\n".join(json.dumps({k: row[k] for k in ORDER if k in row}) for row in rows)
    others = ",\n".join(json.dumps(row) for row in results.get("others", []))
    head = f'{{"torch": "{results["torch"]}", "transformers": "{results["transformers"]}"'
    return f'{head}, "classes": [\n{lines}\n], "others": [\n{others}\n]}}\n'


def page(results: dict[str, Any]) -> str:
    """Return the page of results."""
    rows = results["classes"]
    built = [row for row in rows if "unbuilt" not in row]
    states = sorted({row["state"] for row in rows})
    text = HEAD + f"\nMeasured with torch {results['torch']} and transformers {results['transformers']}, at the state"
    text += f"{'s' if len(states) > 1 else ''} {', '.join(f'`{s}`' for s in states)} of the repository. "
    text += "`make models-page` makes this page; `python -m tools.models_page measure CLASS` measures a class again.\n"
    text += "\n## Totals\n\n" + _totals(rows)
    through = [row for row in built if row.get("interface")]
    text += f"\nPrefix tuning works on {_share(through, 'prefix')} of the classes whose attention goes through "
    text += "transformers' attention interface.\n"
    for label in dict.fromkeys(m for row in rows for m in row["mappings"]):
        mine = [row for row in built if row["mappings"][0] == label]
        if mine:
            text += f"\n## {label}\n\n" + _table(
                ["class", *CELLS], ([f"`{r['name']}`", *map(_word, _cells(r))] for r in mine)
            )
    text += _others(results.get("others", []))
    text += "\n## What is missing\n"
    for cell, about in CELLS.items():
        text += _reasons(
            f"{cell}: {about}",
            ((_reason(row, cell), row["name"]) for row in built if row.get(cell) not in ("works", "-", None)),
        )
    return text + _reasons(
        "Classes that are not measured, and why", ((r["unbuilt"], r["name"]) for r in rows if "unbuilt" in r)
    )


def _others(rows: list[Row]) -> str:
    cells = ("linear", "attention", "named", "merge")
    lines = ([r["name"], *(_word(r[c]) for c in cells), f"`{r['sites']}`"] for r in rows)
    text = """
## Other libraries

Small models of timm, diffusers, sentence-transformers and plain torch, measured in the same way. **named** is LoRA at
the sites of the last column, and **merge** merges that. Where attention is refused, its maps have names that inference
does not know, or are not modules: name them by path.

"""
    return text + _table(["model", *cells, "sites"], lines) if rows else ""


def _totals(rows: list[Row]) -> str:
    labels = dict.fromkeys(m for row in rows for m in row["mappings"])
    lines = []
    for label in [*labels, "all"]:
        mine = [row for row in rows if label in (*row["mappings"], "all")]
        built = [row for row in mine if "unbuilt" not in row]
        lines.append([label, len(mine), len(built), *(_share(built, cell) for cell in CELLS)])
    return _table(["mapping", "classes", "run", *CELLS], lines)


def _share(rows: list[Row], cell: str) -> str:
    """Return how many of the rows to which a cell applies it works for; 100 % are all of them."""
    found = [row[cell] for row in rows if _word(row.get(cell, "-")) != "-"]
    good = sum(text == "works" for text in found)
    return f"{good} of {len(found)} ({100 * good // len(found)} %)" if found else "-"


def _cells(row: Row) -> list[str]:
    return [row.get(cell, "") for cell in CELLS]


def _word(text: str | None) -> str:
    return "yes" if text == "works" else (text or "").partition(":")[0]


def _reason(row: Row, cell: str) -> str:
    """Return why a cell does not work, without the name of the model type."""
    why: str = row[cell]
    return why.replace(f"'{row['model_type']}'", "the model")


def _reasons(title: str, pairs: Iterable[tuple[str, str]]) -> str:
    found = defaultdict(list)
    for reason, name in pairs:
        found[reason].append(name)
    rows = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return (
        f"\n### {title}\n\n" + _table(["why", "classes"], ([why, ", ".join(sorted(n))] for why, n in rows))
        if rows
        else ""
    )


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([str(v) for v in row] for row in rows)]
    return "".join(f"| {' | '.join(_plain(v) for v in line)} |\n" for line in lines)


def _plain(text: str) -> str:
    return text if text.startswith("`") else text.translate({ord(c): f"\\{c}" for c in "|_*[]"}).replace("<", "&lt;")


def measured(names: list[str], folder: Path, wanted: tuple[str, ...] = tuple(CELLS)) -> list[Row]:
    """Measure classes and return their rows; results stay in `folder`, and those there are not measured again."""
    from tools.models.classes import entries
    from tools.models.run import sweep

    sweep(names, folder, wanted)
    state = _state()
    rows = []
    for name in names:
        row = json.loads((folder / f"{name}.json").read_text("utf-8"))
        rows.append({k: row[k] for k in ORDER if k in row} | {"mappings": entries()[name].mappings, "state": state})
    return rows


def _state() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def update(names: list[str], again: bool, wanted: tuple[str, ...]) -> None:
    """Measure cells of classes into the stored results; other cells stay where the model is built as it was."""
    import torch
    import transformers
    from tools.models.classes import entries

    old = {row["name"]: row for row in load()["classes"]}
    right = {n for n, row in old.items() if all(row.get(c) in ("works", "-") for c in CELLS)}
    todo = names or [n for n in entries() if again or n not in right]
    rows = {n: row for n, row in old.items() if n in entries()}
    for row in measured(todo, DRAFTS, wanted):
        rows[row["name"]] = joined(old.get(row["name"], {}), row)
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "classes": list(rows.values())}
    RESULTS.write_text(dump(load() | found), "utf-8")
    shutil.rmtree(DRAFTS)


def joined(old: Row, new: Row) -> Row:
    """Return a new row with the old one's other cells, if both were measured on the same model with the same inputs."""
    alike = all(old.get(key) == new.get(key) for key in ("built", "inputs", "parameters"))
    return ({k: v for k, v in old.items() if k in CELLS} if alike and "built" in new else {}) | new


def main() -> None:
    """Run the command."""
    words = sys.argv[1:]
    if words[:1] == ["measure"]:
        wanted = next((w.removeprefix("--cells=") for w in words if w.startswith("--cells=")), ",".join(CELLS))
        names = [w for w in words[1:] if not w.startswith("--")]
        update(names, "--again" in words, tuple(c for c in CELLS if c in wanted.split(",")))
    if words[:1] == ["others"]:
        from tools.models.others import measured as others

        RESULTS.write_text(dump(load() | {"others": others()}), "utf-8")
    PAGE.write_text(page(load()), "utf-8")


if __name__ == "__main__":
    main()
