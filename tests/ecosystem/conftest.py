"""The tiny model that the tests under other trainers share, and the trainers themselves, imported when needed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import transformers as tf

from ecosystem.common import saved


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved Llama with a tokenizer that has a chat template."""
    return saved(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def trl() -> Any:
    """TRL; importing it takes seconds."""
    tf.utils.logging.disable_progress_bar()
    importlib.import_module("datasets").disable_progress_bars()
    return importlib.import_module("trl")
