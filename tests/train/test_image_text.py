"""Questions about images: what rows become by a model's own processor, on which tokens the loss falls, and runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from peftree.data.chats import IMAGE, Turn
from peftree.data.rows import Example, load_data
from peftree.errors import ConfigError, DataError
from peftree.settings import RunConfig
from peftree.tasks.image_text import ImageText
from peftree.train.run import open_run, run
from train.seeing import FAMILIES, built, saved

CHATS = [family for family in FAMILIES if family != "paligemma"]
ASKED = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "Which colour?"}]
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": "A dark one."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image", "image": "1.png"}]},
    {"role": "assistant", "content": "Light."},
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with images of two sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(8):
        pixels = np.random.default_rng(n).integers(0, 255, (40 + 20 * (n % 2), 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


def rows(folder: Path, lines: list[dict[str, Any]], name: str = "a.jsonl") -> Path:
    """Write rows."""
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def task(family: str) -> tuple[ImageText, Any]:
    """Return the task with a fresh model of a family."""
    torch.manual_seed(0)
    model, processor = built(family)
    return ImageText(model.eval(), processor, 512), processor


def shown(made: ImageText, feature: dict[str, Any]) -> list[str]:
    """Return the pieces of a row that are learned."""
    pieces: list[list[int]] = []
    for token, before, label in zip(feature["input_ids"], [-100, *feature["labels"]], feature["labels"], strict=False):
        if label != -100:
            pieces = [*pieces, [token]] if before == -100 else [*pieces[:-1], [*pieces[-1], token]]
    return [made.tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("family", CHATS)
def test_a_row_is_what_the_processor_makes_of_it_and_answers_are_learned(family: str, pictures: Path) -> None:
    """The oracle is the processor's own call on the whole text."""
    made, processor = task(family)
    path = rows(pictures, [{"messages": TALK}] * 12)
    data = load_data(path, valid=path)
    assert data.task == "image-text-to-text"
    (feature,) = made.features(data.train[:1])
    assert shown(made, feature) == ["A dark one.<|im_end|>", "Light.<|im_end|>"]
    images = [Image.open(pictures / f"{n}.png") for n in (0, 1)]
    bare = [{**turn, "content": turn["content"] if isinstance(turn["content"], list) else [
        {"type": "text", "text": turn["content"]}]} for turn in TALK]  # fmt: skip
    text = processor.apply_chat_template(bare, tokenize=False)
    whole = processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
    count = len(feature["input_ids"])
    assert whole["input_ids"][0].tolist()[:count] == feature["input_ids"]
    batch = made.collate([feature])
    for name, value in whole.items():
        if name in ("input_ids", "attention_mask") or name.endswith("type_ids"):
            assert torch.equal(batch[name], value[:, :count]), name
        else:
            assert torch.equal(batch[name], value), name
    with torch.no_grad():
        assert torch.isfinite(made.model(**batch).loss)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the processor's own labels
def test_without_a_chat_template_a_row_is_one_question(pictures: Path) -> None:
    """PaliGemma's own processor with a suffix is the oracle."""
    made, processor = task("paligemma")
    turns = (Turn("user", f"{IMAGE}Which?", images=(str(pictures / "0.png"),)), Turn("assistant", "A dark one."))
    (feature,) = made.features([Example("Which?", "A dark one.", "a:1", turns)])
    assert shown(made, feature) == ["A dark one.</s>"]
    own = processor(
        text=["<image>Which?"], images=[[Image.open(pictures / "0.png")]], suffix=["A dark one."], return_tensors="pt"
    )
    batch = made.collate([feature])
    for name in ("input_ids", "token_type_ids", "pixel_values", "labels"):
        assert torch.equal(batch[name], own[name]), name
    with pytest.raises(DataError, match="a:2: the model has no chat template"):
        made.features([Example("x", "y", "a:2", (*turns, *turns))])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_do_not_see_each_other(family: str, pictures: Path) -> None:
    made, _ = task(family)
    lines = [{"image": f"{n}.png", "question": "Which?" + "?" * n, "answer": f"a{n}"} for n in range(3)]
    data = load_data(rows(pictures, lines * 4), valid=pictures / "a.jsonl", task="image-text-to-text")
    features = made.features(data.train[:3])
    together = made.collate(features)
    keys = ("labels",)
    with torch.no_grad():
        both = made.model(**{k: v for k, v in together.items() if k not in keys}).logits
        for n, feature in enumerate(features):
            alone = made.collate([feature])
            one = made.model(**{k: v for k, v in alone.items() if k not in keys}).logits[0]
            assert torch.allclose(one, both[n, : len(one)], atol=1e-4), n


LAYOUTS: list[tuple[str, str]] = [
    ("a.jsonl", '{"image": "0.png", "question": "Which?", "answer": "dark"}'),
    ("a.csv", "image,question,answer\n0.png,Which?,dark"),
    ("metadata.csv", "file_name,question,answer\n0.png,Which?,dark"),
    ("a.jsonl", '{"images": ["0.png"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", '
                '"text": "Which?"}]}, {"role": "assistant", "content": "dark"}]}'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), LAYOUTS)
def test_layouts_of_questions_about_images(name: str, text: str, pictures: Path) -> None:
    (pictures / name).write_text(text + "\n")
    path = pictures if name.startswith("metadata") else pictures / name
    found = load_data(path, valid=path)
    assert found.task == "image-text-to-text"
    assert found.train[0].turns == (
        Turn("user", f"{IMAGE}Which?", images=(str(pictures / "0.png"),)), Turn("assistant", "dark"),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_of_captions_asks_for_them(name: str, pictures: Path) -> None:
    text = "file_name,text\n0.png,dark\n" if name.endswith("csv") else '{"file_name": "0.png", "text": "dark"}\n'
    (pictures / name).write_text(text)
    found = load_data(pictures, valid=pictures, task="image-text-to-text")
    assert found.train[0].turns[0].text == f"{IMAGE}Caption:" and found.train[0].target == "dark"
    assert load_data(pictures, valid=pictures, task="captioning").train[0].target == "dark"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"image": "9.png", "question": "Q", "answer": "A"}, r"a\.jsonl:3: there is no image '9\.png'"),
        ({"image": "/0.png", "question": "Q", "answer": "A"}, r"a\.jsonl:3: the image '/0\.png' leaves"),
        (
            {"image": "0.png", "question": "Q", "answer": ""},
            r"1 of 3 rows lack an image, a question or an answer: .*a\.jsonl:3",
        ),
        ({"text": "x"}, r"a\.jsonl:3: text are not the columns of image, question and answer rows"),
    ],
)
def test_a_faulty_row_is_named_before_a_model_loads(line: dict[str, Any], why: str, pictures: Path) -> None:
    good = {"image": "0.png", "question": "Q", "answer": "A"}
    path = rows(pictures, [good, good, line])
    with pytest.raises(DataError, match=why):
        run(RunConfig(model="/nowhere", data={"train": str(path)}, output=str(pictures / "o")))


def test_turns_with_faulty_images_are_named(pictures: Path) -> None:
    answer = {"role": "assistant", "content": "A"}
    image = [{"type": "image"}]
    for messages, why in (
        ([{"role": "user", "content": image}, answer], r"a\.jsonl:1: an image names no file"),
        ([{"role": "assistant", "content": image}], r"a\.jsonl:1: turn 1 of messages has an image, and its role is"),
    ):
        path = rows(pictures, [{"messages": messages}])
        with pytest.raises(DataError, match=why):
            load_data(path)
        with pytest.raises(DataError, match=r"a\.jsonl:1: it holds an image, which generation does not read"):
            load_data(path, task="generation")
    left = rows(pictures, [{"images": ["0.png", "1.png"], "messages": [{"role": "user", "content": image}, answer]}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 1 of its images are in no turn"):
        load_data(left)


def test_a_row_without_room_for_an_answer_is_named(pictures: Path) -> None:
    made, _ = task("llava")
    made.length = 20
    data = load_data(rows(pictures, [{"messages": TALK}] * 12), valid=pictures / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:1: its images and questions take \d+ tokens, and max_length is 20"):
        made.features(data.train)


@pytest.mark.parametrize(
    "family", ["paligemma", *(pytest.param(name, marks=pytest.mark.slow) for name in ("idefics3", "gemma3", "llava"))]
)
def test_a_run_learns_answers_and_opens_again(family: str, pictures: Path, tmp_path: Path) -> None:
    lines = [{"image": f"{n % 2}.png", "question": "Q", "answer": ("dark", "light")[n % 2]} for n in range(8)]
    path = rows(pictures, lines)
    config = RunConfig(
        model=saved(family, tmp_path / "model"), data={"train": str(path), "valid": str(path)}, steps=4, batch_size=4,
        output=str(tmp_path / "o"), lr=0.01, generate=2, method={"name": "lora"},
    )  # fmt: skip
    found = run(config)
    assert found.score < found.base_score and "chrf" in found.values
    assert open_run(tmp_path / "o").score("valid").score == pytest.approx(found.score, rel=1e-5)


def test_captioning_takes_any_model_with_a_processor(pair_data: Path, tmp_path: Path) -> None:
    config = RunConfig(
        model=saved("paligemma", tmp_path / "model"), data={"train": str(pair_data)}, task="captioning", steps=2,
        batch_size=4, output=str(tmp_path / "o"), base_score=False, quiet=True,
    )  # fmt: skip
    assert run(config).task == "captioning"


def test_a_model_without_a_processor_is_one_error(llava: str, pictures: Path) -> None:
    path = rows(pictures, [{"image": "0.png", "question": "Q", "answer": "A"}] * 4)
    bare = shutil.copytree(llava, pictures / "model")
    (bare / "processor_config.json").unlink()
    config = RunConfig(model=str(bare), data={"train": str(path)}, output=str(pictures / "o"))
    with pytest.raises(ConfigError, match=r"its LlavaProcessor reads no image: .*patch_size"):
        run(config)


def test_the_packaged_pair_answers_questions(llava: str, pictures: Path) -> None:
    path = rows(pictures, [{"image": f"{n % 2}.png", "question": "Q", "answer": "A"} for n in range(8)])
    config = RunConfig(
        model=llava, data={"train": str(path), "valid": str(path)}, steps=2, batch_size=4, output=str(pictures / "o"),
        base_score=False, quiet=True,
    )  # fmt: skip
    assert run(config).task == "image-text-to-text"


WRITES_PARTS = "m['content'] if m['content'] is string else m['content'] | tojson"


@pytest.mark.parametrize("content", ["m['content']", "m['content'] | trim", f"({WRITES_PARTS})"])
def test_a_template_of_texts_alone_gets_the_image_token(pictures: Path, content: str) -> None:
    model, processor = built("llava")
    processor.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + " + content + " + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    made = ImageText(model.eval(), processor, 512)
    path = rows(pictures, [{"image": "0.png", "question": "Q", "answer": "A"}] * 4)
    (feature,) = made.features(load_data(path, valid=path).train[:1])
    assert feature["text"].startswith(f"<user>{processor.image_token}") and "type" not in feature["text"]
    assert shown(made, feature) == ["A</s>"]
