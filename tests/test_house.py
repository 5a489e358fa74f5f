"""The house holds: budgets, one-way imports, types and docstrings; and each check bites."""

from __future__ import annotations

import importlib
import inspect
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import pytest_socket

import house

REPOSITORY = Path(__file__).parents[1]
ROOT = REPOSITORY / "src" / "peftree"
Check = Callable[[Path], list[str]]
CHECKS: list[Check] = [
    house.lengths,
    house.rooms,
    house.shadows,
    house.first_lines,
    house.duplicates,
    house.undocumented,
    house.untyped,
    house.arrows,
    house.circles,
    house.method_imports,
    house.probes,
    house.copied_fields,
]
SIX = "".join(f"a{i} = {i}\n" for i in range(house.RUN))
LORA = "methods/reparameterized/lora.py"


def package(folder: Path, files: dict[str, str]) -> Path:
    """Write a package called peftree and return its folder."""
    root = folder / "peftree"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return root


def lines(count: int) -> str:
    """Return a file of `count` lines whose first says what it is."""
    return '"""A file."""\n' + "x = 1\n" * (count - 1)


def function(count: int) -> str:
    """Return a file with one function of `count` lines."""
    return '"""A file."""\n\n\ndef f() -> None:\n    """Do."""\n' + "    f()\n" * (count - 2)


def typed(name: str, *more: str, start: int = 0, count: int = house.ALIKE) -> str:
    """Return a class with the fields ``f0: int`` up to so many."""
    fields = [*more, *(f"f{i}: int" for i in range(start, max(start, count)))]
    return f"class {name}:\n" + "".join(f"    {each}\n" for each in fields)


# what is written, the check, and words of the fault; the neighbour that passes is below
BAD: list[tuple[Check, dict[str, str], str]] = [
    (house.lengths, {LORA: lines(73)}, "73 lines, at most 72"),
    (house.lengths, {"methods/hybrid/mam.yaml": "a: 1\n" * 11}, "11 lines, at most 10"),
    (house.lengths, {"train/loop.py": lines(401)}, "401 lines, at most 400"),
    (house.lengths, {"report/page.css": "a {}\n" * 401}, "401 lines, at most 400"),
    (house.lengths, {"train/loop.py": function(51)}, "f has 51 lines"),
    (house.rooms, {"cellar/wine.py": lines(1)}, "cellar: 1 lines, at most 0"),
    (house.rooms, {"runs/a.py": lines(400), "runs/b.py": lines(400)}, "runs: 800 lines, at most"),
    (house.shadows, {"plan/trace.py": lines(1)}, "Python has a module trace"),
    (house.first_lines, {"files.py": "import os\n"}, "line 1"),
    (house.first_lines, {"files.py": '"""\nLate."""\n'}, "line 1"),
    (house.first_lines, {"files.py": '# A comment.\n"""Late."""\n'}, "line 1"),
    (house.first_lines, {"files.py": ""}, "line 1"),
    (house.duplicates, {LORA: SIX, "methods/moe/b.py": "y = 0\n" + SIX}, "repeat"),
    (
        house.duplicates,
        {LORA: SIX, "methods/moe/b.py": "if y:\n    " + SIX.replace("\n", "\n\n    # note\n    ")},
        "repeat",
    ),
    (house.duplicates, {LORA: SIX + "b = 0\n" + SIX}, "repeat"),
    (house.undocumented, {"files.py": "def f() -> None: ...\n"}, "f has no docstring"),
    (house.undocumented, {"files.py": "class A: ...\n"}, "A has no docstring"),
    (
        house.undocumented,
        {"files.py": 'class A:\n    """A."""\n    def f(self) -> None: ...\n'},
        "A.f has no docstring",
    ),
    (
        house.undocumented,
        {"files.py": 'class A(B):\n    """A."""\n    def f(self): ...\nclass B:\n    """B."""\n'},
        "A.f has no docstring",
    ),
    (house.untyped, {"files.py": "def _f(a) -> None: ...\n"}, "no type for a"),
    (house.untyped, {"files.py": "def _f(*a, b: int, **c) -> None: ...\n"}, "no type for a, c"),
    (house.untyped, {"files.py": "def _f(): ...\n"}, "no type for return"),
    (house.untyped, {"files.py": "class A:\n    def f(self, a) -> None: ...\n"}, "no type for a"),
    (
        house.untyped,
        {"files.py": "class A:\n    @staticmethod\n    def f(a) -> None: ...\n"},
        "no type for a",
    ),
    (
        house.arrows,
        {"errors.py": "import peftree.files\n", "files.py": "import peftree.cli\n"},
        "above",
    ),
    (house.arrows, {"graft.py": "from peftree import adapter\n", "adapter.py": ""}, "above"),
    (house.arrows, {"sites/a.py": "from ..deltas import x\n", "deltas/__init__.py": ""}, "above"),
    (house.arrows, {"sites.py": "def f():\n    from peftree.graft import x\n"}, "above"),
    (house.arrows, {"deltas.py": "from peftree import adapt\n", "__init__.py": ""}, "above"),
    (house.arrows, {"utils.py": ""}, "place among LAYERS"),
    (
        house.circles,
        {"store/a.py": "import peftree.store.b\n", "store/b.py": "from . import a\n"},
        "circle",
    ),
    (
        house.circles,
        {
            "store.py": "from peftree import adapter\n",
            "adapter.py": "def f():\n  import peftree.store\n",
        },
        "circle",
    ),
    (
        house.circles,
        {
            "train/a.py": "import peftree.plan.a\n",
            "plan/a.py": "",
            "plan/b.py": "import peftree.train.b\n",
        },
        "circle",
    ),
    (house.method_imports, {LORA: "from peftree.graft import Graft\n"}, "imports peftree.graft"),
    (house.method_imports, {LORA: "from peftree.sites import Site\n"}, "peftree.sites"),
    (house.method_imports, {LORA: "def f():\n    import peftree\n"}, "imports peftree;"),
    (house.method_imports, {LORA: "from ..moe import x\n"}, "imports peftree.methods.moe"),
    (house.probes, {"graft.py": "x = hasattr(1, 'y')\n"}, "hasattr"),
    (
        house.copied_fields,
        {"bench/a.py": typed("A"), "train/b.py": typed("B")},
        "bench.a.A and peftree.train.b.B share",
    ),
    (
        house.copied_fields,
        {
            "bench/a.py": typed("A"),
            "train/b.py": typed("B", "x: int", count=3),
            "train/c.py": "from peftree.train.b import B\n" + typed("C(B)", start=3),
        },
        "bench.a.A and peftree.train.c.C share",
    ),
    (house.probes, {"graft.py": "x = 1  # TODO later\n"}, "unfinished"),
]
GOOD: dict[str, str] = {
    LORA: '"""LoRA."""\nfrom peftree.deltas.verbs import x\nfrom peftree.methods.contract import y\n' + "z = 1\n" * 5,
    "methods/hybrid/mam.yaml": "a: 1\n" * 10,
    "methods/contract.py": '"""Contract."""\nfrom peftree.deltas import x\n',
    "deltas/__init__.py": '"""Deltas."""\nfrom peftree.deltas.verbs import x\n',
    "deltas/verbs.py": '"""Verbs."""\nimport peftree.sites\n' + "x = 1\n" * 398,
    "sites.py": function(50),
    "errors.py": '"""Errors."""\n# hasattr in a comment is not a probe\n',
    "adapter.py": (
        '"""Adapter."""\nclass A(B):\n    """A."""\n    def f(self) -> None: ...\n'
        "    def _g(self) -> None: ...\n"
        'class B(C):\n    """B."""\n'
        'class C:\n    """C."""\n    def f(self) -> None:\n        """Do."""\n'
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_the_house_holds(check: Check) -> None:
    faults = check(ROOT)
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(("check", "files", "words"), BAD)
def test_each_check_bites(check: Check, files: dict[str, str], words: str, tmp_path: Path) -> None:
    faults = check(package(tmp_path, files))
    assert any(words in fault for fault in faults), faults


def test_every_check_has_a_bad_example() -> None:
    assert {check for check, *_ in BAD} == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_a_good_package_passes(check: Check, tmp_path: Path) -> None:
    assert check(package(tmp_path, GOOD)) == []


def test_families_of_classes_and_methods_are_no_copies(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        {
            LORA: typed("LoRA"),
            "methods/moe/molora.py": typed("MoLoRA"),
            "data/rows.py": typed("A", count=9),
            "train/b.py": "from peftree.data.rows import A\n" + typed("B(A)") + typed("C(A)", "c: str"),
            "plan/d.py": typed("D", *(f"d{i}: int" for i in range(5)), count=5),
            "plan/e.py": typed("E", "f0: ClassVar[int]", start=1),
        },
    )
    assert house.copied_fields(root) == []


def test_every_exception_from_the_copies_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {f"{one} and {two} share " for one, two in house.NO_COPIES}
    monkeypatch.setattr(house, "NO_COPIES", {})
    found = house.copied_fields(ROOT)
    assert all(any(fault.startswith(pair) for fault in found) for pair in known), found


def test_the_core_is_small() -> None:
    sizes = house.core(ROOT)
    assert sum(sizes.values()) <= house.CORE, f"the core outgrew its budget: {sizes}"
    blocks = {path.name: house.code_lines(path) for path in house.primitives(ROOT)}
    room = house.PRIMITIVE * len(house.plugins(ROOT, ".py"))
    assert 0 < sum(blocks.values()) <= room, f"the building blocks outgrew the tree: {blocks}"
    foreign = {path.name: house.code_lines(path) for path in house.dialects(ROOT)}
    assert 0 < sum(foreign.values()) <= house.DIALECTS, f"the foreign format outgrew its budget: {foreign}"


def test_core_counts_lines_of_code_only(tmp_path: Path) -> None:
    text = '"""Doc\nstring."""\n\n# comment\nx = [\n    1,\n]\n'
    text += 'def f() -> None:\n    """Do."""\n    f()\n'
    files = dict.fromkeys(("files.py", LORA, "report/page.py"), text)
    root = package(tmp_path, files | {"methods/contract.py": "x = '''a\nb'''\n"})
    assert house.core(root) == {"files": 5, "methods": 2}


def test_the_public_face_is_small_and_true() -> None:
    names = house.public_names(ROOT)
    assert 0 < len(set(names)) == len(names) <= house.NAMES
    peftree = importlib.import_module("peftree")
    for name in names:
        value = getattr(peftree, name)
        assert not inspect.ismodule(value), f"the folder {name}/ hides the name peftree.{name}"


def test_public_names_reads_the_face(tmp_path: Path) -> None:
    root = package(tmp_path, {"__init__.py": '"""Face."""\n__all__ = ["a", *"bc"]\n'})
    assert house.public_names(root) == ["a", "b", "c"]


def test_the_command_line_starts_without_torch() -> None:
    loaded = house.loaded_by("import peftree.cli", ROOT.parent)
    assert "peftree" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "scipy"}


def test_loaded_by_sees_what_a_module_pulls_in(tmp_path: Path) -> None:
    root = package(tmp_path, {"__init__.py": "from peftree import cli\n", "cli.py": "import colorsys\n"})
    assert {"peftree", "colorsys"} <= house.loaded_by("import peftree", root.parent)
    assert "colorsys" not in house.loaded_by("pass", root.parent)


def test_help_loads_nothing_but_what_prints_it() -> None:
    words = "import sys; sys.argv = ['peftree', '--help']; from peftree.cli import main; sys.stdout = sys.stderr"
    loaded = house.loaded_by(f"{words}\ntry: main()\nexcept SystemExit: sys.stdout = sys.__stdout__", ROOT.parent)
    heavy = {"torch", "transformers", "numpy", "scipy", "pydantic", "yaml", "safetensors", "jinja2", "PIL"}
    assert {"typer", "peftree"} <= loaded and not heavy & loaded


def shipped() -> list[Path]:
    """Return the text files of the repository, tests left out: they hold bad examples."""
    top = [p for p in REPOSITORY.glob("*") if p.is_file()]
    deep = [p for d in ("src", "docs", "tools", "benchmarks", ".ci") for p in (REPOSITORY / d).rglob("*")]
    return [p for p in [*top, *deep] if p.suffix in house.TEXT or p.name in ("Makefile", "run")]


def test_no_file_names_the_machine_it_was_written_on() -> None:
    assert house.machine_paths(shipped()) == []


@pytest.mark.parametrize("text", ["see /root/x\n", "--find-links /opt/wheels\n", "a @ file:///b\n"])
def test_machine_paths_bites(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text, "utf-8")
    assert len(house.machine_paths([path])) == 1


def test_every_pin_is_exact_and_every_dependency_pinned() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = (REPOSITORY / "constraints.txt").read_text("utf-8")
    pins = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    assert all(len(p.specifier) == 1 and str(p.specifier).startswith("==") for p in pins)
    exact = {canonicalize_name(p.name): next(iter(p.specifier)).version for p in pins}
    assert exact["torch"] == "2.13.0"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [w for extra in project["project"]["optional-dependencies"].values() for w in extra]
    for each in map(Requirement, wanted):
        assert each.specifier.contains(exact[canonicalize_name(each.name)]), str(each)


def test_no_test_can_reach_the_network() -> None:
    with pytest.raises(pytest_socket.SocketBlockedError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
