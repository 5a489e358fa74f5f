"""The tasks, and what is known about each before anything is loaded; the branches of the taxonomy."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from peftree.errors import ConfigError, did_you_mean

Modality = Literal["language", "vision", "vision-language"]
Kind = Literal["understanding", "generation"]
Aggregate = Literal["mean", "exp_mean"]
Branch = Literal["additive", "selective", "reparameterized", "hybrid", "moe", "unified", "reference"]
BRANCHES: tuple[Branch, ...] = get_args(Branch)


@dataclass(frozen=True)
class TaskFacts:
    """What the class of a task states about it, in literals.

    Attributes:
        name: of the task, in lower case with dashes.
        modality, kind: its place in the matrix {language, vision, vision-language} x {understanding, generation}.
        metric: the primary metric, see `evaluate.quality.Scores`.
        higher_is_better: the metric's direction.
        aggregate: how per-item numbers give the metric.
        columns: a file's columns for the input and the wanted output; none: a folder of images for each class.
        classes: whether the targets are classes, known from the training rows.
        contrastive: whether the loss compares the rows of a forward pass with each other.
        auto: transformers' auto class that builds the task's models.
        auto_pair: the auto class of an encoder-decoder, if the task takes one.
        file: the file that defines the class.
    """

    name: str
    modality: Modality
    kind: Kind
    metric: str
    higher_is_better: bool = True
    aggregate: Aggregate = "mean"
    columns: tuple[str, ...] = ()
    classes: bool = False
    contrastive: bool = False
    auto: str = "AutoModel"
    auto_pair: str = ""
    file: Path = Path()

    @property
    def recorded(self) -> dict[str, Any]:
        """What every run record of the task states."""
        names = ("modality", "kind", "metric", "higher_is_better", "aggregate")
        return {name: getattr(self, name) for name in names}

    def text(self, given: str, wanted: str) -> str:
        """Return the text that a model reads from a row, without images; both sides if the model writes the second."""
        if self.modality != "language":
            return wanted if self.modality == "vision-language" else ""
        return f"{given} {wanted}" if self.kind == "generation" else given


_KNOWN = {f.name for f in fields(TaskFacts)} - {"file"}
_FOLDERS = [Path(__file__).with_name("tasks")]


@cache
def tasks() -> dict[str, TaskFacts]:
    """Return all tasks by name, in the order of their files."""
    found: dict[str, TaskFacts] = {}
    for path in (p for folder in _FOLDERS for p in sorted(folder.glob("*.py"))):
        for node in ast.parse(path.read_text("utf-8"), str(path)).body:
            said = _literals(node) if isinstance(node, ast.ClassDef) else {}
            if {"name", "modality", "kind", "metric"} <= set(said):
                if said["name"] in found:
                    raise ConfigError(
                        f"{path}: the task '{said['name']}' is in {found[said['name']].file} too.", "Rename one."
                    )
                found[said["name"]] = TaskFacts(**said, file=path)
    return found


def _literals(node: ast.ClassDef) -> dict[str, Any]:
    """Return the facts that a class states as literals."""
    found = {}
    for line in node.body:
        named = line.targets[0] if isinstance(line, ast.Assign) else None
        if isinstance(line, ast.Assign) and isinstance(named, ast.Name) and named.id in _KNOWN:
            found[named.id] = ast.literal_eval(line.value)
    return found


def task_facts(name: str) -> TaskFacts:
    """Return the facts of a task.

    Raises:
        ConfigError: there is no task of that name.
    """
    if name not in tasks():
        raise ConfigError(f"There is no task '{name}'.", did_you_mean(name, tasks(), "Tasks"))
    return tasks()[name]


def register_folder(folder: str | Path) -> None:
    """Look for task files in `folder` too."""
    _FOLDERS.append(Path(folder).resolve())
    tasks.cache_clear()


def forget_folder(folder: str | Path) -> None:
    """Undo `register_folder`."""
    _FOLDERS.remove(Path(folder).resolve())
    tasks.cache_clear()
