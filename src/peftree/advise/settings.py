"""From a candidate to a `run.yaml` that `peftree train` accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peftree import registry
from peftree.advise.candidates import Candidate
from peftree.advise.cost import LEAST_LENGTH, Cost, Setting
from peftree.advise.measures import Rate
from peftree.advise.situation import DataProfile, folder_of
from peftree.errors import ConfigError
from peftree.files import atomic_write
from peftree.plan import Request
from peftree.settings import RunConfig


def run_settings(
    asked: Request, data: DataProfile, candidate: Candidate, how: Setting, found: Cost, rate: Rate | None
) -> dict[str, Any]:
    """Return the settings of a run as it was requested; what is left out is the default of the run or the method."""
    settings = asked.model_dump(mode="json", include=set(RunConfig.model_fields) - {"lr"}, exclude_unset=True)
    settings |= {
        "model": folder_of(asked.model), "task": data.task,
        "method": {"name": candidate.method} | ({"fields": candidate.fields} if candidate.fields else {}),
        "output": f"runs/{candidate.slug}", "batch_size": found.batch, "dtype": how.dtype,
    }  # fmt: skip
    if found.plan.request.eval_batch_size != asked.eval_batch_size:
        settings["eval_batch_size"] = found.plan.request.eval_batch_size
    if found.accumulation > 1:
        settings["accumulation"] = found.accumulation
    if found.checkpointing:
        settings["activations"] = "checkpoint"
    if data.tokens is not None and data.modality == "language":
        settings["max_length"] = max(how.length, LEAST_LENGTH)
    if how.image:
        settings["image_size"] = how.image
    if rate is not None:
        settings["lr"] = float(f"{registry.get(candidate.method).tags.lr * rate.times:.2g}")
    RunConfig.model_validate(settings)
    return settings


def write_run(folder: Path, settings: Mapping[str, Any], candidate: Candidate, why: Sequence[str]) -> Path:
    """Write the settings as YAML, with the reasons as comments; an existing file with other content is kept.

    Raises:
        ConfigError: the folder is a file, or the file exists with other content.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--write {folder} is not a folder.", "Name a folder; it may be new.")
    comments = "".join(f"# {line}\n" for line in [candidate.label, *why])
    text = comments + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    path = folder / f"{candidate.slug}.yaml"
    if path.exists() and path.read_text("utf-8") != text:
        raise ConfigError(f"{path} exists with other content.", "Name another folder, or remove the file.")
    return atomic_write(path, text)
