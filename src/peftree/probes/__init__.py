"""Probes, one per file, found by walking: what a finished run is measured for beyond quality. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import JsonValue, ValidationError

from peftree.errors import AdapterError, ConfigError, did_you_mean
from peftree.evaluate.subject import Result, Subject, Unmeasured
from peftree.files import load_module
from peftree.strict import Strict, explain
from peftree.table import Cell, Head

_FOLDERS = [Path(__file__).parent]


class Scale(NamedTuple):
    """How the scores of a task are written: their decimals, and the sign that makes a loss of score positive."""

    decimals: int
    sign: float


@dataclass(frozen=True)
class Sheet:
    """A probe's table in the report."""

    title: str
    caption: str  # in it `{metric}` stands for the task's metric
    heads: tuple[Head, ...]  # the columns after the method's name
    fill: Callable[[Any, Scale], Sequence[Cell]]  # the cells of one method, from the mean of its results over the seeds
    anchor: str = ""  # its place on the page; the probe's name by default


class Probe(Strict):
    """One probe; its fields are its settings. Heavy imports go inside `measure`, so the rest is read without them."""

    name: ClassVar[str]  # what suites and records call it
    tasks: ClassVar[tuple[str, ...]] = ()  # those it applies to, none meaning all
    result: ClassVar[type[Result]]  # what it finds
    sheet: ClassVar[Sheet]
    order: ClassVar[int] = 10  # of its table among those of other probes
    needs_rows: ClassVar[bool] = True  # it cannot be measured without test rows
    timed: ClassVar[bool] = False  # its figures depend on the machine: only runs of one environment are averaged

    def measure(self, subject: Subject) -> Result:
        """Return what is found on a finished run, or why it cannot be measured; the model is left unchanged.

        If `needs_rows` is True, there is at least one test row.
        """
        raise NotImplementedError


@cache
def probes() -> dict[str, type[Probe]]:
    """Return all probes by name, in the order of their tables: the subclasses of `Probe` that state their `name`."""
    found: dict[str, type[Probe]] = {}
    for path in (p for folder in _FOLDERS for p in sorted(folder.glob("[!_]*.py"))):
        try:
            module = load_module(path, __name__)
        except Exception as error:  # any fault of a plug-in file is reported with its path
            raise ConfigError(f"{path} does not load: {type(error).__name__}: {error}.", "Fix or remove it.") from error
        for kind in vars(module).values():
            named = isinstance(kind, type) and issubclass(kind, Probe) and "name" in vars(kind)
            if named and not {"result", "sheet"} <= {n for each in kind.__mro__ for n in vars(each)}:
                raise ConfigError(f"{path}: the probe '{kind.name}' lacks its result or its sheet.", "Define both.")
            if named and found.setdefault(kind.name, kind) is not kind:
                raise ConfigError(f"{path}: there is already a probe '{kind.name}'.", "Rename one.")
    return dict(sorted(found.items(), key=lambda item: item[1].order))


def register_folder(folder: str | Path) -> None:
    """Look for probe files in `folder` too; raise ConfigError if it is not a folder."""
    path = Path(folder).resolve()
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder.", "Name a folder of probe files.")
    if path not in _FOLDERS:
        _FOLDERS.append(path)
    probes.cache_clear()


def folders() -> list[str]:
    """Return the folders, besides peftree's own, in which probe files are."""
    return [str(path) for path in _FOLDERS[1:]]


def forget_folder(folder: str | Path) -> None:
    """Undo `register_folder`."""
    _FOLDERS.remove(Path(folder).resolve())
    probes.cache_clear()


def check(wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Probe]:
    """Return the probes `wanted` with their settings, by name.

    Raises:
        ConfigError: a probe or setting is unknown, or a value is out of range.
    """
    out: dict[str, Probe] = {}
    for name, values in wanted.items():
        if name not in probes():
            raise ConfigError(f"There is no probe {name!r}.", did_you_mean(str(name), probes(), "Probes"))
        try:
            out[name] = probes()[name](**values)
        except ValidationError as error:
            raise ConfigError(*explain(error, probes()[name], f"The probe {name}")) from None
    return out


def run_probes(subject: Subject, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, JsonValue]]:
    """Run the probes `wanted` on a finished run.

    Args:
        subject: the run, with its adapter switched on and not merged.
        wanted: settings by probe, `{"calibration": {}, "noise": {"limit": 20}}`.

    Returns:
        The result of every wanted probe as plain JSON; `{"not measured": reason}` if it cannot be measured.

    Raises:
        ConfigError: a probe or setting is unknown or out of range; nothing is run then.
        AdapterError: the adapter is off or merged, or another adapter is on.
        ValueError: a figure is not finite.
    """
    from peftree.adapter import active

    checked = check(wanted)
    if active(subject.model) != (subject.adapter.name,):
        raise AdapterError(
            f"Only '{subject.adapter.name}' may be on, but {list(active(subject.model))} are.",
            "Call unmerge(model) and switch(model, name) before probing.",
        )
    out: dict[str, dict[str, JsonValue]] = {}
    for name, probe in checked.items():
        why = "There are no test rows." if probe.needs_rows and not subject.rows else ""
        if probe.tasks and subject.task not in probe.tasks:
            why = f"The probe is for {', '.join(probe.tasks)}, not {subject.task}."
        found = Unmeasured(why=why) if why else probe.measure(subject)
        out[name] = found.model_dump(mode="json", by_alias=True, exclude_none=True)
    return out
