"""Tasks behind one small interface; `build_task` loads the model of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peftree.train.data import Data
from peftree.train.facts import FACTS, TaskFacts, TaskName
from peftree.train.tasks import captioning, diffusion, retrieval, seq2seq, text, vision
from peftree.train.tasks.base import Batch, Items, Options, Rows, Task, pad
from peftree.train.tasks.captioning import Captioning
from peftree.train.tasks.generation import Generation
from peftree.train.tasks.retrieval import Retrieval
from peftree.train.tasks.seq2seq import SequenceToSequence
from peftree.train.tasks.text import TextClassification, TextRegression
from peftree.train.tasks.vision import ImageClassification

__all__ = [
    "FACTS",
    "Batch",
    "Captioning",
    "Generation",
    "ImageClassification",
    "Items",
    "Options",
    "Retrieval",
    "Rows",
    "SequenceToSequence",
    "Task",
    "TaskFacts",
    "TextClassification",
    "TextRegression",
    "build_task",
    "pad",
]

# Each loads the model of its task and returns the names of tensors that the model's files lack.
_LOADERS: Mapping[TaskName, Callable[[str, Data, Options], tuple[Task, list[str]]]] = {
    "text-classification": text.load_classification,
    "text-regression": text.load_regression,
    "generation": seq2seq.load_generation,
    "image-classification": vision.load_classification,
    "image-generation": diffusion.load_diffusion,
    "image-text-retrieval": retrieval.load_retrieval,
    "captioning": captioning.load_captioning,
}


def build_task(model: str, data: Data, options: Options | None = None) -> Task:
    """Load the model for the task of `data`, and its tokenizer or image settings.

    Args:
        model: a local folder; or a hub name, which is fetched only because the user gave one.
        data: the checked rows, for task and labels.
        options: precision, lengths and sizes.

    Raises:
        ConfigError: the model does not load, has no such task, or a length or size does not fit.
    """
    task, fresh = _LOADERS[data.task](model, data, options or Options())
    if fresh:
        task.notes.append(f"new tensors, not in the model's files: {', '.join(fresh)}")
    return task
