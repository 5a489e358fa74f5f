"""Virtual tokens come off the length of a row, and are said; a length that was asked for is not changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import peftree
import zoo
from peftree.errors import ConfigError
from peftree.train.run import _leave_room


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_room_is_left(method: str) -> None:
    adapter = peftree.adapt(zoo.build("gpt2"), method, length=5)
    config: Any = SimpleNamespace(max_length=None, where=lambda key: "")
    for length, left in ((40, 35), (36, 35), (35, 35), (20, 20), (0, 0)):
        task: Any = SimpleNamespace(length=length, notes=[])
        _leave_room(config, task, adapter)
        assert task.length == left and len(task.notes) == (left < length)
    config.max_length = 36
    with pytest.raises(ConfigError, match=r"max_length=36: 5 of the model's 40") as caught:
        _leave_room(config, SimpleNamespace(length=36, notes=[]), adapter)  # type: ignore[arg-type]
    assert "max_length: 35" in str(caught.value.fix)
