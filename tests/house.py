"""The checks of the house: each reads a package folder and returns one line a fault.

`root` is the folder of the package, `src/peftree`. The budgets are those of the design; the code
is read with `ast`; only `public_names` and `loaded_by` run it, in a process of their own.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

METHOD, RECIPE, FILE, FUNCTION, NAMES, CORE, RUN = 72, 10, 400, 50, 20, 7030, 6
PRIMITIVE = 20  # lines of code of the building blocks in deltas/ for each method file (decisions 0012, 0045)
VERBS = ("__init__", "combine", "place", "scene", "verbs")  # of deltas/, what the contract itself is made of
DIALECTS = 2500  # lines of code of the foreign format, beside the core (decision 0007)
ALIKE, ALIKE_SHARE = 6, 0.6  # so many fields, and so large a part of the smaller class, in common are a copied list
NO_COPIES = {
    ("peftree.advise.table.Context", "peftree.report.data.Task"): "rows is a count here and the rows of a table there",
    ("peftree.bench.versus.Duel", "peftree.report.data.Row"): "of a row, the test is absent where nothing was compared",
    ("peftree.report.data.Failure", "peftree.runs.record.RunRecord"): "the texts of a record made safe to show",
    ("peftree.settings.RunConfig", "peftree.tasks.base.Options"): "picked out of a run by their names, without data",
}
TEXT = (".py", ".yaml", ".j2", ".css", ".js", ".md", ".toml", ".txt", ".sh", ".yml")
# From the top down. A unit imports from lower lines, or from its own line if no circle arises.
# "" is the package's own __init__.py, the public face.
LAYERS = (
    ("__main__", "cli"),
    ("describe", "doctor"),
    ("",),
    ("demo",),
    ("report",),
    ("advise",),
    ("bench",),
    ("probes", "assets"),
    ("train", "plan", "federated", "serve"),
    ("runs",),
    ("tasks", "evaluate", "factors"),
    ("data",),
    ("store", "compose", "adapter"),
    ("activations", "making", "named_method", "loss"),
    ("graft",),
    ("registry",),  # it yields Method classes, so it stands above the contract
    ("methods",),
    ("deltas",),
    ("sites",),
    ("settings", "setting_rows", "catalogue", "resolver", "optimizers", "precision"),
    ("errors", "files", "machine", "printing", "strict", "table", "text", "trusted"),
)
# Applications, built on the core; the peers' cores have none of these either (decision 0002).
ON_THE_CORE = (
    *("advise", "assets", "bench", "catalogue", "cli", "data", "demo", "describe", "doctor", "evaluate", "factors"),
    *("machine", "named_method", "optimizers", "plan", "precision", "printing", "probes", "report", "resolver", "runs"),
    *("loss", "setting_rows", "settings", "table", "tasks", "text", "train", "trusted"),
)
# Lines of each room, with blank ones, comments and docstrings; "" is the files that lie in no room. Methods, recipes
# and the building blocks in deltas/ grow with the tree and have limits of their own: METHOD, RECIPE, PRIMITIVE.
ROOMS = {
    "": 3720,
    "sites": 2060,
    "deltas": 1000,
    "methods": 570,
    "graft": 3745,
    "loss": 540,
    "store": 4425,
    "data": 1570,
    "tasks": 2600,
    "evaluate": 1400,
    "runs": 450,
    "train": 3470,
    "plan": 3570,
    "assets": 1600,
    "probes": 970,
    "bench": 2650,
    "advise": 2150,
    "report": 2900,
}
ALLOWED_IN_METHODS = re.compile(r"peftree\.(methods\.contract|deltas(\.\w+)*)\Z")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of one file."""
    return ast.parse(path.read_text("utf-8"), str(path))


def python(root: Path) -> list[Path]:
    """Return the package's Python files."""
    return sorted(root.rglob("*.py"))


def plugins(root: Path, suffix: str) -> list[Path]:
    """Return the files that grow: methods or recipes in the branches' folders."""
    found = sorted((root / "methods").glob(f"*/*{suffix}"))
    return [p for p in found if p.name != "__init__.py"]


def lengths(root: Path) -> list[str]:
    """Method, recipe, file and function budgets."""
    limits = {p: FILE for p in root.rglob("*") if p.suffix in TEXT}
    limits |= dict.fromkeys(plugins(root, ".py"), METHOD)
    limits |= dict.fromkeys(plugins(root, ".yaml"), RECIPE)
    faults = []
    for path, limit in sorted(limits.items()):
        size = len(path.read_text("utf-8").splitlines())
        if size > limit:
            faults.append(f"{path}: {size} lines, at most {limit}; split it or say it shorter")
    for path in python(root):
        for node in ast.walk(parse(path)):
            if isinstance(node, Function):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION:
                    faults.append(f"{path}:{node.lineno}: {node.name} has {size} lines")
    return faults


def rooms(root: Path) -> list[str]:
    """Every room has a budget of lines and keeps it."""
    sizes: dict[str, int] = defaultdict(int)
    for path in set(python(root)) - set(plugins(root, ".py")) - set(primitives(root)):
        parts = path.relative_to(root).parts
        sizes[parts[0] if len(parts) > 1 else ""] += len(path.read_text("utf-8").splitlines())
    return [
        f"{root / room}: {size} lines, at most {ROOMS.get(room, 0)}; say it shorter, or give it a budget"
        for room, size in sorted(sizes.items())
        if size > ROOMS.get(room, 0)
    ]


def shadows(root: Path) -> list[str]:
    """No module has the name of one of the standard library."""
    return [f"{path}: Python has a module {path.stem}" for path in python(root) if path.stem in sys.stdlib_module_names]


def first_lines(root: Path) -> list[str]:
    """Line 1 of every file is a docstring that says what the file is."""
    faults = []
    for path in python(root):
        line = (path.read_text("utf-8").splitlines() or [""])[0]
        if not re.match(r'r?"""\S', line) or ast.get_docstring(parse(path)) is None:
            faults.append(f"{path}:1: line 1 does not say what the file is")
    return faults


def _normal(path: Path) -> list[tuple[int, str]]:
    """Return number and text of the lines that count as code for `duplicates`."""
    tree = parse(path)
    imports = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    kept = ((number, line.strip()) for number, line in lines if number not in imports)
    return [(number, line) for number, line in kept if line and not line.startswith("#")]


def duplicates(root: Path) -> list[str]:
    """No run of RUN equal lines stands twice inside methods/."""
    seen: dict[tuple[str, ...], str] = {}
    faults = []
    for path in sorted((root / "methods").rglob("*.py")):
        lines = _normal(path)
        for i in range(len(lines) - RUN + 1):
            run = tuple(text for _, text in lines[i : i + RUN])
            place = f"{path}:{lines[i][0]}"
            if run in seen:
                faults.append(f"{place}: {RUN} lines repeat {seen[run]}; move them to deltas/")
            seen.setdefault(run, place)
    return faults


def _fields(root: Path) -> dict[str, tuple[set[str], set[str]]]:
    """Return for each class the fields that it types itself, and it with the classes that it inherits from."""
    typed: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for path in sorted(set(python(root)) - set(plugins(root, ".py"))):
        module, nodes = _module(root, path), list(ast.walk(parse(path)))
        home = {a.name: n.module for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
        for node in (n for n in nodes if isinstance(n, ast.ClassDef)):
            own = (s for s in node.body if isinstance(s, ast.AnnAssign) and "ClassVar" not in ast.unparse(s.annotation))
            typed[f"{module}.{node.name}"] = {ast.unparse(s.target) for s in own}
            names = [ast.unparse(b).split("[")[0] for b in node.bases]
            bases[f"{module}.{node.name}"] = [f"{home.get(name, module)}.{name}" for name in names]

    def line(name: str) -> set[str]:
        return {name}.union(*(line(base) for base in bases[name] if base in bases))

    return {name: (own, line(name)) for name, own in typed.items()}


def copied_fields(root: Path) -> list[str]:
    """No two unrelated classes hold mostly the same fields; methods share names of hyper-parameters, not a base."""
    classes, faults = _fields(root), []
    for one, two in itertools.combinations(sorted(classes), 2):
        (own, ups), (other, above) = classes[one], classes[two]
        held, holds, family = ({f for up in line for f in classes[up][0]} for line in (ups, above, ups & above))
        same = (held & holds) - family
        if one in above or two in ups or not (own & same and other & same):
            continue
        if NO_COPIES.keys() & set(itertools.product(ups, above)):
            continue
        if len(same) >= ALIKE and len(same) >= ALIKE_SHARE * min(len(held), len(holds)):
            faults.append(f"{one} and {two} share {', '.join(sorted(same))}; type them once")
    return faults


def _scopes(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, ast.ClassDef | Function]]:
    """Yield public classes and functions, with the class that holds each."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        yield None, node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.ClassDef | Function) and not member.name.startswith("_"):
                    yield node, member


def _decorated(node: ast.ClassDef | Function, *endings: str) -> bool:
    return any(ast.unparse(d).split("(")[0].endswith(endings) for d in node.decorator_list)


def undocumented(root: Path) -> list[str]:
    """Every public class and function has a docstring, its own or that of what it overrides."""
    classes: dict[str, list[ast.ClassDef]] = defaultdict(list)
    for path in python(root):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(node)

    def inherited(holder: ast.ClassDef, name: str, seen: frozenset[str]) -> bool:
        bases = {ast.unparse(b).split("[")[0].split(".")[-1] for b in holder.bases} - seen
        return any(
            any(getattr(m, "name", "") == name and ast.get_docstring(m) for m in base.body)  # type: ignore[arg-type]
            or inherited(base, name, seen | bases)
            for base_name in bases
            for base in classes[base_name]
        )

    faults = []
    for path in python(root):
        for holder, node in _scopes(parse(path)):
            if ast.get_docstring(node) or _decorated(node, "overload", ".setter"):
                continue
            if holder is None or not inherited(holder, node.name, frozenset()):
                owner = f"{holder.name}." if holder else ""
                faults.append(f"{path}:{node.lineno}: {owner}{node.name} has no docstring")
    return faults


def untyped(root: Path) -> list[str]:
    """Every argument and every return value of every function has a type."""
    faults = []
    for path in python(root):
        methods = {
            id(member)
            for node in ast.walk(parse(path))
            if isinstance(node, ast.ClassDef)
            for member in node.body
            if isinstance(member, Function) and not _decorated(member, "staticmethod")
        }
        for node in ast.walk(parse(path)):
            if not isinstance(node, Function):
                continue
            a = node.args
            named = [*a.posonlyargs, *a.args][1 if id(node) in methods else 0 :] + a.kwonlyargs
            named += [extra for extra in (a.vararg, a.kwarg) if extra]
            bare = [arg.arg for arg in named if arg.annotation is None]
            bare += ["return"] if node.returns is None else []
            if bare:
                faults.append(f"{path}:{node.lineno}: {node.name}: no type for {', '.join(bare)}")
    return faults


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path) -> dict[str, list[tuple[str, Path, int]]]:
    """Return what each module imports of the package, function-level imports included."""
    files = {_module(root, p): p for p in python(root)}
    out: dict[str, list[tuple[str, Path, int]]] = {name: [] for name in files}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*(up if node.level else []), *([node.module] if node.module else [])])
                full = [f"{base}.{alias.name}" for alias in node.names]
                found = [f if f in files else base for f in full]
            else:
                continue
            ours = [f for f in dict.fromkeys(found) if f.split(".")[0] == root.name]
            out[name] += [(f, path, node.lineno) for f in ours]
    return out


def _unit(module: str) -> str:
    return [*module.split("."), ""][1]


def arrows(root: Path) -> list[str]:
    """Imports run down the layers, and every unit has a place in them."""
    rank = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
    faults = []
    for name, targets in imports(root).items():
        if _unit(name) not in rank:
            faults.append(f"{name}: its place among LAYERS is not stated")
            continue
        for target, path, line in targets:
            if rank.get(_unit(target), -1) < rank[_unit(name)]:
                faults.append(f"{path}:{line}: {name} imports {target}, which stands above it")
    return faults


def circles(root: Path) -> list[str]:
    """No module and no unit reaches itself through imports."""
    modules = {n: {t for t, *_ in targets if t != n} for n, targets in imports(root).items()}
    units: dict[str, set[str]] = defaultdict(set)
    for name, targets in modules.items():
        units[_unit(name)] |= {_unit(t) for t in targets} - {_unit(name)}
    return [f"{' > '.join(circle)}: a circle of imports" for graph in (modules, units) for circle in _circles(graph)]


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return one circle for each node that first closes one."""
    state: dict[str, int] = {}
    found: list[list[str]] = []

    def visit(node: str, trail: list[str]) -> None:
        state[node] = 1
        for following in sorted(graph.get(node, ())):
            if state.get(following) == 1:
                found.append([*trail[trail.index(following) :], following])
            elif following not in state:
                visit(following, [*trail, following])
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            visit(node, [node])
    return found


def method_imports(root: Path) -> list[str]:
    """A method file imports only the contract and the deltas of ours."""
    files = set(plugins(root, ".py"))
    return [
        f"{path}:{line}: imports {target}; a method file needs no more than the contract and deltas"
        for targets in imports(root).values()
        for target, path, line in targets
        if path in files and not ALLOWED_IN_METHODS.match(target)
    ]


def probes(root: Path) -> list[str]:
    """Nothing is probed with hasattr, and nothing is left undone."""
    faults = []
    for path in python(root):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Name) and node.id == "hasattr":
                faults += [f"{path}:{node.lineno}: hasattr; declare the fact instead"]
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if re.search(r"#.*\b(TODO|FIXME|XXX)\b", line):
                faults.append(f"{path}:{number}: a note of unfinished work")
    return faults


def machine_paths(files: Iterable[Path]) -> list[str]:
    """No file names a place on the machine where it was written."""
    pattern = re.compile(r"(?<![\w.])/(?:root|work|opt|home/\w+)/|file:/{2}/\w")
    return [
        f"{path}:{number}: names a path of one machine"
        for path in sorted(files)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


def code_lines(path: Path) -> int:
    """Return how many lines hold code: no blank line, no comment, no docstring."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    text = path.read_text("utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parse(path)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines -= set(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    return len(lines)


def dialects(root: Path) -> list[Path]:
    """Return the files that read and write another library's format."""
    return sorted((root / "store" / "hfpeft").glob("*.py"))


def primitives(root: Path) -> list[Path]:
    """Return the building blocks of methods: they grow with the tree."""
    return [p for p in sorted((root / "deltas").glob("*.py")) if p.stem not in VERBS]


def core(root: Path) -> dict[str, int]:
    """Return lines of code by unit: plug-ins, building blocks, dialects and what is built on the core left out."""
    grown = {*plugins(root, ".py"), *primitives(root), *dialects(root)}
    sizes: dict[str, int] = defaultdict(int)
    for path in python(root):
        unit = path.relative_to(root).parts[0].removesuffix(".py")
        if path not in grown and unit not in ON_THE_CORE:
            sizes[unit] += code_lines(path)
    return dict(sizes)


def _run(code: str, path: Path) -> list[str]:
    """Return the words on the last line that `code` prints in a fresh interpreter."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[-2].split()


def public_names(root: Path) -> list[str]:
    """Return `__all__` of the package."""
    return _run(f"import {root.name}\nprint(*{root.name}.__all__)", root.parent)


def loaded_by(statement: str, path: Path) -> set[str]:
    """Return the top-level packages in memory after `statement` in a fresh interpreter."""
    show = "import sys\nprint(*{m.split('.')[0] for m in sys.modules})"
    return set(_run(f"{statement}\n{show}", path))


if __name__ == "__main__":
    here = Path(__file__).parents[1] / "src" / "peftree"
    methods = len(plugins(here, ".py"))
    for part, size, most in (
        ("core", sum(core(here).values()), CORE),
        ("building blocks", sum(map(code_lines, primitives(here))), PRIMITIVE * methods),
        ("dialects", sum(map(code_lines, dialects(here))), DIALECTS),
    ):
        print(f"{part}: {size:,} lines of code of {most:,}")
