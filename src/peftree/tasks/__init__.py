"""Tasks behind one small interface, each in its own file; `build_task` loads the model of one."""

from __future__ import annotations

from functools import cache

from peftree.catalogue import task_facts
from peftree.data.rows import Data
from peftree.files import load_module
from peftree.tasks.base import Batch, Items, Options, Rows, Task, pad

__all__ = ["Batch", "Items", "Options", "Rows", "Task", "build_task", "kind", "pad"]

_module = cache(load_module)


def kind(name: str) -> type[Task]:
    """Return the class of a task, from the file that `catalogue` found it in.

    Raises:
        ConfigError: there is no task of that name.
    """
    module = _module(task_facts(name).file, __name__)
    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Task)]
    return next(c for c in own if vars(c).get("name") == name and c.__module__ == module.__name__)


def build_task(model: str, data: Data, options: Options | None = None) -> Task:
    """Load the model for the task of `data`, and its tokenizer or image settings; see `Task.load`.

    Raises:
        ConfigError: the model does not load or has no such task, or a length or size does not fit.
    """
    options = options or Options()
    task, fresh = kind(data.task).load(model, data, options)
    task.chunked = options.chunked_loss
    if fresh:
        task.notes.append(f"new tensors, not in the model's files: {', '.join(fresh)}")
    return task
