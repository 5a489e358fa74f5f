"""`peftree models`, `peftree data`, and packaged models by name wherever a model is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftree import resolver
from peftree.assets.data import SOURCES
from peftree.assets.fetch import make_folder
from peftree.assets.models import MODELS
from peftree.cli import app
from peftree.errors import AssetError, DataError
from peftree.resolver import located


def shown(*words: str) -> str:
    return CliRunner().invoke(app, list(words), catch_exceptions=False).stdout


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of another cache counts; the packaged model of the project itself needs no network."""
    monkeypatch.setenv("PEFTREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lists_name_everything_with_its_licence() -> None:
    assert [row["name"] for row in json.loads(shown("models", "--json"))] == list(MODELS)
    assert [row["name"] for row in json.loads(shown("data", "--json"))] == list(SOURCES)
    assert all(row["licence"] for kind in ("models", "data") for row in json.loads(shown(kind, "--json")))
    for kind, names in (("models", MODELS), ("data", SOURCES)):
        lines = shown(kind).splitlines()
        assert max(map(len, lines)) <= 80 and set(names) <= {line.split()[0] for line in lines if line.strip()}


def test_a_model_is_made_once_and_its_folder_printed(own_cache: Path) -> None:
    folder = Path(shown("models", "dit-fashion").strip())
    assert folder.is_relative_to(own_cache) and (folder / "model.safetensors").is_file()
    assert json.loads(shown("models", "dit-fashion", "--json"))["folder"] == str(folder) == located("dit-fashion")


def test_what_is_no_packaged_model_stays_as_it_is(own_cache: Path) -> None:
    (own_cache / "minilm-l6").mkdir()
    assert [located(name) for name in ("minilm-l6", "org/model", "./x")] == ["minilm-l6", "org/model", "./x"]


def test_another_package_brings_models_by_name(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_cache / "zoo_of_theirs.py").write_text(
        "from pathlib import Path\ndef find(name, quiet):\n    return Path("
        "f'/models/{name}/{quiet}') if name == 'theirs' else None"
    )
    monkeypatch.syspath_prepend(str(own_cache))
    theirs = EntryPoint("theirs", "zoo_of_theirs:find", resolver.GROUP)
    monkeypatch.setattr(resolver, "entry_points", lambda group: [*entry_points(group=group), theirs])
    assert (located("theirs"), located("org/model")) == ("/models/theirs/False", "org/model")
    assert Path(located("dit-fashion", quiet=True)).is_dir()


def test_inspect_and_plan_take_the_name() -> None:
    found = json.loads(shown("inspect", "dit-fashion", "--json"))
    assert found["class"] == "DiffusionTransformer" and found["parameters"] == 758_064
    planned = json.loads(shown("plan", "dit-fashion", "method=lora", "batch_size=4", "--json"))
    assert planned["model"] == "DiffusionTransformer" and planned["low"] > 0 and "not traced" not in str(planned)


def test_files_of_the_user_beside_data_or_in_them_are_not_replaced(own_cache: Path) -> None:
    def build(rows: str) -> Callable[[Path], None]:
        return lambda folder: write(folder / "train.csv", f"text,label\n{rows}")

    def write(path: Path, text: str) -> None:
        path.write_text(text)

    folder = make_folder(own_cache / "d", "one", build("a,x\n"), "data", quiet=True)
    make_folder(folder, "two", build("b,y\n"), "data", quiet=True)  # what peftree wrote, it may write again
    assert "b,y" in (folder / "train.csv").read_text()
    for name, text in (("notes.txt", "mine"), ("train.csv", "text,label\nmy own,z\n")):
        before = (folder / "train.csv").read_text()
        write(folder / name, text)
        for key in ("two", "three"):
            if name == "notes.txt" and key == "two":
                continue  # nothing to do
            with pytest.raises(AssetError, match=f"did not write: {name}"):
                make_folder(folder, key, build("c,w\n"), "data", quiet=True)
        assert (folder / name).read_text() == text
        (folder / name).unlink()
        write(folder / "train.csv", before)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AssetError, match="Did you mean 'minilm-l6'"):
        shown("models", "minilm-16")
    with pytest.raises(DataError, match="Did you mean 'movies'"):
        shown("data", "movie")
