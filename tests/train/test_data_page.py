"""The examples of docs/data.md: each is read, and the loss falls on the tokens that it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from peftree.data.picture import content
from peftree.data.rows import load_data
from peftree.tasks.image_text import ImageText
from train.seeing import built
from train.test_image_text import shown
from train.test_tools import TOOLS, WRITTEN
from train.test_turns import Words, bytewise

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
EXAMPLES: list[tuple[str, str]] = re.findall(r"```(json|csv)\n(.*?)\n```", PAGE, re.DOTALL)
END = "<|im_end|>"
# What is learned of each example: a label or score, or the pieces of text with a loss.
LEARNED: list[tuple[str, list[str] | str]] = [
    ("text-classification", "good"),
    ("text-regression", "4.5"),
    ("generation", [f" a mechanical device that prevents a vessel from moving{END}"]),
    ("generation", [f"Lima.{END}", f"Santiago.{END}"]),
    ("generation", [f"Lima.{END}"]),
    ("generation", [f"Lima.{END}"]),
    ("generation", [f"Lima.{END}"]),
    ("generation", [WRITTEN, f"Yes, 21 degrees.{END}"]),
    ("generation", [f"nchors were first made of stone.{END}"]),
    ("image-text-to-text", [f"Red.{END}"]),
    ("image-text-to-text", [f"The first.{END}"]),
    ("image-text-to-text", [f"Red.{END}"]),
    ("image-text-to-text", [f"a red square{END}"]),
]


def test_every_example_is_checked() -> None:
    assert len(EXAMPLES) == len(LEARNED)


def test_the_written_images_are_read_from_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)\n```", PAGE, re.DOTALL)
    for n, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # the page's own lines
    asked = load_data("questions", valid="questions")
    classes = load_data("classes.parquet", valid="classes.parquet")
    assert (asked.task, classes.task) == ("image-text-to-text", "image-classification")
    (image,) = asked.train[0].turns[0].images
    assert content(image) == content(classes.train[0].source) == (tmp_path / "0.png").read_bytes()
    torch.manual_seed(0)
    made = ImageText(*built("llava"), 512)
    assert shown(made, made.features(asked.train)[0]) == [f"Red.{END}"]


@pytest.mark.parametrize("number", range(len(LEARNED)))
def test_an_example_is_read_and_the_loss_falls_on_what_is_learned(number: int, tmp_path: Path) -> None:
    (suffix, text), (task, wanted) = EXAMPLES[number], LEARNED[number]
    header, row = text.split("\n") if suffix == "csv" else ("", text)
    rows = [row, "a cold one,bad" if wanted == "good" else row] * 6
    path = tmp_path / f"a.{suffix}"
    path.write_text("\n".join([header, *rows] if header else rows) + "\n")
    for n, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 40), colour).save(tmp_path / f"{n}.png")
    alone = header == "file_name,text" or (suffix == "json" and set(json.loads(row)) == {"text"})
    data = load_data(path, valid=path, task=task if alone else None)
    assert data.task == task
    if isinstance(wanted, str):
        assert data.train[0].target == wanted
        return
    torch.manual_seed(0)
    made: Any = ImageText(*built("llava"), 512) if task == "image-text-to-text" else Words(bytewise(TOOLS))
    if task == "generation":
        made.chat = bool(data.train[0].turns)
    (feature,) = made.features(data.train[:1])
    assert shown(made, feature) == wanted
