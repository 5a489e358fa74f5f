"""A small Llama in a folder, and its loading in every form of quantisation."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from quantized.llama import Loader, loaded, saved


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, 64 units wide."""
    return saved(tmp_path_factory.mktemp("llama"), 64)


@pytest.fixture
def load(folder: Path) -> Loader:
    """Loads the model in one form or another."""
    return functools.partial(loaded, path=folder)
