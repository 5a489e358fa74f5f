"""Pages generated from the code while MkDocs runs: methods, command line, names, sites, changelog.

MkDocs loads this file as a hook (see mkdocs.yml). Nothing is written into docs/: the pages exist
only in the built site, so they cannot fall behind the code.
"""

from __future__ import annotations

import html
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import peftree
from peftree import describe, registry

sys.path.insert(0, str(Path(__file__).parents[1]))  # MkDocs loads this file by its path
from tools import method_pages as pages

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "peftree"
LANGUAGES = {".py": "python", ".yaml": "yaml"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages, the decisions and the laboratory notes into the navigation."""
    branches: dict[str, list[Any]] = {}
    for row in describe.method_rows():
        branches.setdefault(row["branch"], []).append({row["name"]: f"methods/{row['name']}.md"})
    methods: list[Any] = [{"The tree": "methods/index.md"}, *({b: p} for b, p in branches.items())]
    assert config.nav is not None
    config.nav += [
        {"Methods": methods},
        {"Reference": [{"Command line": "cli.md"}, {"Python": "api.md"}, {"Sites": "sites.md"}]},
        *_folder("Decisions", "decisions"),
        *_folder("Laboratory", "lab"),
        {"Changelog": "changelog.md"},
    ]
    return config


def _folder(title: str, name: str) -> list[dict[str, list[str]]]:
    pages = sorted((REPOSITORY / "docs" / name).glob("*.md"))
    return [{title: [f"{name}/{p.name}" for p in pages]}] if pages else []


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    rows = describe.method_rows()
    pages = {
        "methods/index.md": tree(rows),
        "cli.md": command_line(),
        "api.md": names(),
        "sites.md": sites(),
        "changelog.md": (REPOSITORY / "CHANGELOG.md").read_text("utf-8"),
    }
    pages |= {f"methods/{row['name']}.md": method(row["name"]) for row in rows}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a Markdown table; bars inside cells are escaped."""
    lines = [list(head), *([_cell(v) for v in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _entry(row: dict[str, Any]) -> str:
    """Return the name of a method as a link, with its equation below."""
    return f"[{row['name']}]({row['name']}.md) `{row['equation']}`"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _paper(paper: str) -> str:
    """Link an arXiv number."""
    number = paper.removeprefix("arXiv ")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number != paper else paper


def tree(rows: list[dict[str, Any]]) -> str:
    """Return the page of the survey's tree: every row with its state, to be searched and filtered; then all methods."""
    facts = {row["name"]: row for row in rows}
    text = "# The tree of methods\n\nThe survey's 157 rows, and which of them work here.\n\n" + TREE_FILTER
    found = describe.tree_rows()
    for branch in dict.fromkeys(row["branch"] for row in found):
        some = [row for row in found if row["branch"] == branch]
        works = sum(row["state"] == "works" for row in some)
        lines = "".join(_tree_line(row, facts) for row in some)
        text += f'<details class="branch" open><summary><b>{branch}</b> ({works} of {len(some)} work)</summary>'
        text += f"<ul>{lines}</ul></details>\n"
    text += "\n" + "".join(f"* *{mark}*: {meaning}\n" for mark, meaning in (describe.STATES | describe.NEEDS).items())
    text += "\n## All methods\n\nMade from the tags that each method declares. Default rates are for AdamW.\n"
    text += f"A rate without a source was {describe.OURS}.\n"
    for branch in dict.fromkeys(row["branch"] for row in rows):
        found = [row for row in rows if row["branch"] == branch]
        names = ("identity at start", "merges", "adds tokens", "inference cost", "default lr", "default lr from")
        cells = [[_entry(row), *(row[name] for name in names)] for row in found]
        text += f"\n### {branch}\n\n{table(['method', *names], cells)}"
    return text


TREE_FILTER = """<p id="tree-filter">
<input type="search" aria-label="search the tree" placeholder="name, paper or method">
<label><input type="checkbox" value="works" checked> works</label>
<label><input type="checkbox" value="designed" checked> designed</label>
<label><input type="checkbox" value="open" checked> open</label>
<label><input type="checkbox" value="record" checked> record</label>
<label><input type="checkbox" value="out" checked> out</label>
<output aria-live="polite"></output></p>
<script>
addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("tree-filter"), rows = [...document.querySelectorAll("li[data-state]")]
  const show = () => {
    const words = box.querySelector("[type=search]").value.toLowerCase()
    const states = [...box.querySelectorAll(":checked")].map(c => c.value)
    for (const row of rows)
      row.hidden = !(states.includes(row.dataset.state) && row.textContent.toLowerCase().includes(words))
    for (const branch of document.querySelectorAll("details.branch"))
      branch.hidden = !branch.querySelector("li:not([hidden])")
    box.querySelector("output").textContent = ` ${rows.filter(r => !r.hidden).length} of ${rows.length} rows`
  }
  box.addEventListener("input", show)
  show()
})
</script>

"""


def _tree_line(row: dict[str, Any], facts: dict[str, dict[str, Any]]) -> str:
    """Return one row of the tree as a list item; our methods are links with their equations as titles."""
    links = " ".join(
        f'<a href="{name}.html" title="{html.escape(facts[name]["equation"])}">{name}</a>' for name in row["methods"]
    )
    more = links or html.escape(" ".join([f"peftree.{name}()" for name in row["functions"]] or row["needs"]))
    words = f"{row['row']} {html.escape(row['name'])} <small>{html.escape(row['paper'])}, {row['state']}</small>"
    return f'<li data-state="{row["state"]}">{words} {more}</li>'


def method(name: str) -> str:
    """Return one method's page: equation, paper, facts, fields, and the file itself."""
    info = describe.describe_method(name)
    fields = ("name", "type", "default", "limits", "description")
    source = _source(registry.get(name).tags.branch, name)
    text = f"# {name}\n\n{pages.equation(info['equation'])}\n{_paper(info['paper'])}, branch *{info['branch']}*.\n"
    text += f'\n```python\nadapter = peftree.adapt(model, "{name}")\n```\n'
    text += f"\n## Where it sits\n\n{pages.drawing(name)}\n"
    text += table(("role", "what it does there"), pages.places(name).items())
    text += "\n## What it trains\n\nThe closed form of its file, with the fields' defaults.\n\n"
    text += table(("model", "parameters", "share", "where, or why not"), pages.counts(name))
    text += "\n## Fields\n\n"
    text += table(fields, ([f"`{f['name']}`", *(f[k] for k in fields[1:])] for f in info["fields"]))
    skipped = {"branch", "paper", "small", "peft"}
    info["tags"]["lr_from"] = info["tags"]["lr_from"] or describe.OURS
    tags = ((k.replace("_", " "), v) for k, v in info["tags"].items() if k not in skipped and v not in ({}, None))
    text += f"\n## Facts\n\n{table(['fact', 'value'], tags)}"
    text += "\n## Relations\n\n" + _relations(name)
    if source is not None:
        body = source.read_text("utf-8").rstrip()
        text += f"\n## The whole method\n\n`{source.relative_to(REPOSITORY)}`\n\n"
        text += f"```{LANGUAGES[source.suffix]}\n{body}\n```\n"
    return text


def _relations(name: str) -> str:
    """Return the sentences about what is built like a method."""
    kin, near, blocks = pages.neighbours(name)
    links = [", ".join(f"[{other}]({other}.md)" for other in some) for some in (kin, near)]
    text = f"Of the same file or base: {links[0]}.\n\n" if kin else ""
    text += f"Built from {', '.join(f'`{b}`' for b in blocks)}" if blocks else "Built from the contract alone"
    return text + (f", as are in part {links[1]}.\n" if near else ".\n")


def _source(branch: str, name: str) -> Path | None:
    stem = PACKAGE / "methods" / branch / name
    return next((p for s in LANGUAGES if (p := stem.with_suffix(s)).is_file()), None)


def command_line() -> str:
    """Return the reference of the command line, written by typer itself."""
    command = "-m typer peftree.cli utils docs --name peftree --title".split()
    run = [sys.executable, *command, "Command line"]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


def names() -> str:
    """Return the reference of the public Python names."""
    text = "# Python\n\nThe public names of `peftree`.\n"
    for name in peftree.__all__:
        value = getattr(peftree, name)
        doc = inspect.getdoc(value) or ""
        text += f"\n## {name}\n\n```python\n{name}{_signature(value)}\n```\n\n"
        text += f"```text\n{doc}\n```\n"
    return text


class _Plain:
    """An annotation that prints as it was written, without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(value: Any) -> str:
    """Return a signature as it was written, folded to the width of a page."""
    found = inspect.signature(value)
    made = [p.replace(annotation=_plain(p.annotation)) for p in found.parameters.values()]
    text = str(found.replace(parameters=made, return_annotation=_plain(found.return_annotation)))
    return textwrap.fill(text, 80, subsequent_indent="    ", break_long_words=False)


def _plain(annotation: Any) -> Any:
    return _Plain(annotation) if isinstance(annotation, str) else annotation


def sites() -> str:
    """Return the page of role records: which model families are known, and their roles."""
    text = "# Sites\n\nOne record a model family names the place of every role; `peftree inspect` "
    text += "shows the sites of one model. Other models are read from their structure.\n\n"
    rows = []
    for path in sorted((PACKAGE / "roles").glob("*.yaml")):
        record = yaml.safe_load(path.read_text("utf-8"))
        types = ", ".join(f"`{t}`" for t in record.get("model_types", []))
        rows.append((f"`{path.name}`", types))
    return text + table(("record", "model types"), rows)
