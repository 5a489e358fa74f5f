"""What is known of each task before anything is loaded: modality, kind, metric. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

TaskName = Literal[
    "text-classification",
    "text-regression",
    "generation",
    "image-classification",
    "image-generation",
    "image-text-retrieval",
    "captioning",
]
TASKS: tuple[TaskName, ...] = get_args(TaskName)


@dataclass(frozen=True)
class TaskFacts:
    """The facts of a task.

    Attributes:
        modality, kind: its place in the matrix {language, vision, vision-language} x {understanding, generation}.
        metric: the primary metric, see `evaluate.quality.Scores`.
        higher_is_better: the metric's direction.
        aggregate: how per-item numbers give it.
        columns: of a file, what is given and what is wanted of the model; none: a folder of images for each class.
        classes: whether the targets are classes, known from the training rows.
    """

    modality: Literal["language", "vision", "vision-language"]
    kind: Literal["understanding", "generation"]
    metric: str
    higher_is_better: bool = True
    aggregate: Literal["mean", "exp_mean"] = "mean"
    columns: tuple[str, ...] = ()
    classes: bool = False


_PAIRS = ("file_name", "text")
FACTS: dict[str, TaskFacts] = {
    "text-classification": TaskFacts("language", "understanding", "accuracy", columns=("text", "label"), classes=True),
    "text-regression": TaskFacts("language", "understanding", "mae", higher_is_better=False, columns=("text", "score")),
    "generation": TaskFacts(
        "language", "generation", "perplexity", False, "exp_mean", columns=("prompt", "completion")
    ),
    "image-classification": TaskFacts("vision", "understanding", "accuracy", classes=True),
    "image-generation": TaskFacts("vision", "generation", "denoising_loss", higher_is_better=False, classes=True),
    "image-text-retrieval": TaskFacts("vision-language", "understanding", "recall@1", columns=_PAIRS),
    "captioning": TaskFacts("vision-language", "generation", "perplexity", False, "exp_mean", columns=_PAIRS),
}
