"""Names that stand for a model's folder; any installed package may provide some, as peftree does."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

# Entry points: functions of a name and `quiet` that return a folder, or None for a name that is not theirs.
GROUP = "peftree.models"


def located(model: str, quiet: bool = False) -> str:
    """Return the folder of a model that a package provides, fetched the first time; any other name unchanged.

    Raises:
        AssetError: the model could not be fetched.
    """
    if Path(model).exists():
        return model
    found = (point.load()(model, quiet) for point in entry_points(group=GROUP))
    return str(next((folder for folder in found if folder is not None), model))
