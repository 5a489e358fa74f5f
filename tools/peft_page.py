"""Run the matrix of Hugging Face PEFT's files and write its ledger and its page: `python tools/peft_page.py`."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LEDGER, PAGE = ROOT / "docs" / "peft-files.json", ROOT / "docs" / "peft-files.md"
VERDICTS = ("right", "refused", "PEFT cannot", "wrong")
HEAD = """# Hugging Face PEFT's files

What happens to adapter files of Hugging Face PEFT {peft} here, and to ours there, on tiny random models of transformers
{transformers}. Made by `make peft-page`, which runs every case with PEFT as the oracle: PEFT makes an adapter of random
values and saves it, we load it and the outputs are compared; or we save one, and PEFT loads it.

* *Right*: equal within 1e-5 (of the largest value, where that is above 1), at every token that is not padding.
* *Refused*: an error before anything is changed, with a reason of the list below.
* *PEFT cannot*: PEFT itself raises, or does not read its own file back.
* *Wrong*: anything else.

The cases leave out modules whose weight a model reads without calling them: `out_proj` of torch's MultiheadAttention,
`q_proj` of WavLM, `dt_proj` of Mamba. There our adapters change what is computed, and PEFT's change nothing. Saving for
PEFT warns of such places, as far as they are known: those of MultiheadAttention, and others once a run has read them. A
file that PEFT wrote warns in its first run.

"""


def run() -> dict[str, Any]:
    """Run every case and return the ledger."""
    sys.path.insert(0, str(ROOT / "tests"))
    cases: Any = importlib.import_module("store.peftcases")
    writes: Any = importlib.import_module("store.peftwrites").WRITE
    matrix: Any = importlib.import_module("store.peftmatrix")
    ledger: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("peft", "transformers")}
    ledger["reasons"] = {name: says for name, (says, _) in matrix.REASONS.items()}
    for kind, all_cases, one in (("read", cases.READ, matrix.read), ("write", writes, matrix.write)):
        ledger[kind] = {}
        for done, case in enumerate(all_cases):
            if sys.stderr.isatty():
                print(f"\r{kind} {done + 1} of {len(all_cases)} ", end="", file=sys.stderr)
            ledger[kind][case.key] = list(one(case))
    return ledger


def page(ledger: dict[str, Any]) -> str:
    """Return the page of a ledger."""
    lines = [HEAD.format(**ledger), f"| | cases | {' | '.join(VERDICTS)} |", "|---|" + "---:|" * (len(VERDICTS) + 1)]
    for kind, says in (("read", "PEFT's files read here"), ("write", "our files read by PEFT")):
        count = Counter(verdict for verdict, _ in ledger[kind].values())
        lines.append(f"| {says} | {len(ledger[kind])} | {' | '.join(str(count[v]) for v in VERDICTS)} |")
    lines += ["", "## Reasons", "", "| reason | what it says |", "|---|---|"]
    lines += [f"| {name} | {says} |" for name, says in ledger["reasons"].items()]
    for kind, title in (("read", "PEFT's files read here"), ("write", "Our methods written for PEFT")):
        lines += [
            "",
            f"## {title}",
            "",
            f"| method | option | {' | '.join(VERDICTS)} |",
            "|---|---|" + "---|" * len(VERDICTS),
        ]
        lines += rows(ledger[kind])
    lines += ["", "## What PEFT says where it cannot", ""]
    for kind in ("read", "write"):
        lines += [f"* {key}: {why}" for key, (verdict, why) in ledger[kind].items() if verdict == "PEFT cannot"]
    return "\n".join(lines) + "\n"


def rows(outcomes: dict[str, list[str]]) -> list[str]:
    """Return one row a method and option, with the families in the column of their verdict."""
    table: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, (verdict, why) in outcomes.items():
        method, option, family = key.split(" | ")
        said = f"{family} ({why})" if verdict == "refused" else family
        table[method, option][verdict].append(said)
    return [
        f"| {method} | {option} | {' | '.join(', '.join(found[v]) for v in VERDICTS)} |"
        for (method, option), found in table.items()
    ]


def main() -> int:
    """Run the matrix and write both files; with --page write the page of the ledger that is there."""
    ledger = json.loads(LEDGER.read_text("utf-8")) if "--page" in sys.argv else run()
    lines = [f'"{k}": {json.dumps(v, ensure_ascii=False)}' for k, v in ledger.items() if k not in ("read", "write")]
    for kind in ("read", "write"):
        entries = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in ledger[kind].items())
        lines.append(f'"{kind}": {{\n{entries}\n}}')
    LEDGER.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    PAGE.write_text(page(ledger), "utf-8")
    wrong = [
        f"{kind} {key}: {why}"
        for kind in ("read", "write")
        for key, (verdict, why) in ledger[kind].items()
        if verdict == "wrong"
    ]
    print("\n".join(wrong) or "nothing is wrong", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
