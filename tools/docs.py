"""Pages generated from the code while MkDocs runs: methods, command line, names, sites, changelog.

MkDocs loads this file as a hook (see mkdocs.yml). Nothing is written into docs/: the pages exist
only in the built site, so they cannot fall behind the code.
"""

from __future__ import annotations

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
    """Return the page of all methods, branch by branch."""
    text = "# The tree of methods\n\nMade from the tags that each method declares.\n"
    text += "Default rates are for AdamW.\n"
    for branch in dict.fromkeys(row["branch"] for row in rows):
        found = [row for row in rows if row["branch"] == branch]
        facts = ("identity at start", "merges", "adds tokens", "inference cost", "default lr")
        lines = [[_entry(row), *(row[fact] for fact in facts)] for row in found]
        text += f"\n## {branch}\n\n{table(['method', *facts], lines)}"
    return text


def method(name: str) -> str:
    """Return one method's page: equation, paper, facts, fields, and the file itself."""
    info = describe.describe_method(name)
    fields = ("name", "type", "default", "limits", "description")
    source = _source(registry.get(name).tags.branch, name)
    text = f"# {name}\n\n`{info['equation']}`\n\n{_paper(info['paper'])}, branch *{info['branch']}*.\n"
    text += f'\n```python\nadapter = peftree.adapt(model, "{name}")\n```\n'
    text += "\n## Fields\n\n"
    text += table(fields, ([f"`{f['name']}`", *(f[k] for k in fields[1:])] for f in info["fields"]))
    skipped = {"branch", "paper"}
    tags = ((k.replace("_", " "), v) for k, v in info["tags"].items() if k not in skipped)
    text += f"\n## Facts\n\n{table(['fact', 'value'], tags)}"
    if source is not None:
        body = source.read_text("utf-8").rstrip()
        text += f"\n## The whole method\n\n`{source.relative_to(REPOSITORY)}`\n\n"
        text += f"```{LANGUAGES[source.suffix]}\n{body}\n```\n"
    return text


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
