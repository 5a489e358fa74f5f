"""The hash of the code that a benchmark's figures depend on: `python -m tools.hot_code` prints it.

It is of the syntax trees of the files below a few folders of the package, without docstrings, comments and layout. The
tree is written in a form of our own, since `ast.dump` differs between versions of Python: a node is its class and the
fields that hold something, in the order of the grammar. Names of fields that came with a later version hold nothing in
code that the earlier one reads.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "peftree"
FOLDERS = ("deltas", "graft")
SILENT = {"ctx", "kind", "type_comment", "type_ignores"}  # they follow from the rest, or say nothing of the code


def written(node: object) -> str:
    """Return a tree as text; statements that are a bare string are left out."""
    if isinstance(node, list):
        return f"[{' '.join(written(each) for each in node if not _prose(each))}]"
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if name not in SILENT)
        held = (f"{name}={written(value)}" for name, value in fields if value is not None and value != [])
        return f"{type(node).__name__}({' '.join(held)})"
    return repr(node)


def _prose(node: object) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def digest(folders: tuple[str, ...] = FOLDERS, package: Path = PACKAGE) -> str:
    """Return the hash of the Python files below folders of a package, their paths included."""
    found = hashlib.sha256()
    for path in sorted(p for folder in folders for p in (package / folder).rglob("*.py")):
        text = f"{path.relative_to(package).as_posix()}\n{written(ast.parse(path.read_text('utf-8')))}\n"
        found.update(text.encode())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    print(digest())
