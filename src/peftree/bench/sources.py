"""Models and data of a suite's tasks: fetched or found, written once and hashed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from peftree.assets.data import write_data
from peftree.assets.models import MODELS, model_folder
from peftree.bench.suite import Source, SuiteTask
from peftree.errors import ConfigError, DataError
from peftree.files import cache_root

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Files:
    """The files of one source: its folder, and the SHA-256 of its contents."""

    folder: Path
    sha256: str

    def split(self, name: str) -> str:
        """Return the path of a split.

        Raises:
            DataError: there is no such split.
        """
        found = sorted(p for p in self.folder.glob(f"{name}*") if p.stem == name and not p.name.startswith("."))
        if len(found) != 1:
            there = ", ".join(sorted(p.name for p in self.folder.iterdir() if not p.name.startswith("."))) or "nothing"
            raise DataError(
                f"{self.folder} has {len(found)} splits called '{name}'.",
                f"It needs one file or folder {name}; it has {there}.",
            )
        return str(found[0])


@dataclass(frozen=True)
class Material:
    """What the runs of a task read."""

    model: str
    weights: str
    data: Files
    shifted: dict[str, Files]
    stages: dict[str, Files]
    general: Files | None

    @property
    def sha256(self) -> str:
        """One hash over all data files."""
        parts = [self.data, *self.shifted.values(), *self.stages.values(), *([self.general] if self.general else [])]
        if len(parts) == 1:
            return self.data.sha256
        return hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest()


def gather(task: SuiteTask, quiet: bool = False) -> Material:
    """Return the model and data of a task; fetch and write what is missing.

    Raises:
        AssetError: something could not be fetched.
        DataError: files are missing, or do not have the hash that the suite names.
    """
    model = str(model_folder(task.model, quiet)) if task.model in MODELS else task.model
    return Material(
        model=model,
        weights=weights_hash(model),
        data=files(task.data, quiet),
        shifted={name: files(source, quiet) for name, source in task.shifted.items()},
        stages={name: files(source, quiet) for name, source in task.stages.items()},
        general=files(task.general, quiet) if task.general else None,
    )


def files(source: Source, quiet: bool = False) -> Files:
    """Return the files of one source.

    Raises:
        DataError: files are missing, or do not have the hash that the suite names.
    """
    if source.source == "files":
        folder = Path(str(source.path)).expanduser()
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder.", "It must hold the splits train, valid and test.")
    else:
        plain = source.model_dump(mode="json", exclude={"sha256"})
        name = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
        target = cache_root() / "data" / f"{source.source}-{name}"
        sizes: dict[str, int] = {split: source.sizes[split] for split in SPLITS if split in source.sizes}
        folder = write_data(target, source.source, source.options, sizes, source.seed, quiet)
    found = folder_hash(folder)
    if source.sha256 and found != source.sha256:
        raise DataError(
            f"The files in {folder} have SHA-256 {found}, but the suite was made for {source.sha256}.",
            "Restore the files, or change the suite, which changes its results.",
        )
    return Files(folder, found)


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 over names and contents of the files below a folder, except hidden ones."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in name.split("/")):
            with path.open("rb") as file:
                total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def weights_hash(model: str) -> str:
    """Return 16 digits of the SHA-256 over a local model's files; its name if it is on a hub."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")):
            raise ConfigError(f"model: {model} is not a folder.", "Name the folder with config.json.")
        return model
    return folder_hash(folder)[:16]
