"""Images with texts: what is read and refused, retrieval, captioning and its control."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import peftree
from peftree.data.rows import Data, Example, load_data
from peftree.errors import ConfigError, DataError, TrainError
from peftree.evaluate.quality import retrieve
from peftree.settings import RunConfig
from peftree.sites import task_head
from peftree.tasks import Options, build_task
from peftree.tasks.captioning import Captioning
from peftree.tasks.image_text_retrieval import Retrieval
from peftree.train.run import open_run, run
from sampled import quick
from train.tiny import write_pairs

METHODS = ("lora", "vpt", "prefix_tuning", "ia3", "ssf", "full", "head_only")


def retrieval(dual: str, folder: Path, **options: Any) -> tuple[Retrieval, Data]:
    data = load_data(folder, task="image-text-retrieval")
    task = build_task(dual, data, Options(**options))
    assert isinstance(task, Retrieval)
    return task, data


def captioning(llava: str, folder: Path, **options: Any) -> tuple[Captioning, Data]:
    data = load_data(folder, task="captioning")
    task = build_task(llava, data, Options(**options))
    assert isinstance(task, Captioning)
    return task, data


def test_folder_with_metadata(pair_data: Path) -> None:
    data = load_data(pair_data, task="captioning")
    assert (len(data.train), len(data.valid), len(data.test), data.labels) == (24, 8, 8, ())
    row = data.train[0]
    assert row.source.endswith("train/0.png") and row.where.endswith("train/metadata.jsonl:1")
    assert row.target == "a good film" and data.warnings == ()
    assert load_data(pair_data / "train", test=pair_data / "test", task="captioning").test == data.test
    with pytest.raises(DataError, match=r"does not set the task.*captioning, image-text-to-text, image-text-retrieval"):
        load_data(pair_data)
    renamed = pair_data / "renamed"
    write_pairs(renamed, 20)
    text = (renamed / "metadata.jsonl").read_text().replace('"text"', '"caption"')
    (renamed / "metadata.jsonl").write_text(text)
    assert load_data(renamed, task="captioning", columns={"text": "caption"}).train[0].target


def test_the_same_image_in_two_splits_is_named(pair_data: Path) -> None:
    shutil.copy(pair_data / "train" / "0.png", pair_data / "test" / "5.png")
    warnings = load_data(pair_data, task="captioning").warnings
    assert len(warnings) == 1 and "1 of 8 test rows are also training rows" in warnings[0]


BAD = [
    ({"file_name": "../train/0.png", "text": "x"}, r"metadata\.jsonl:9: the image '\.\./train/0\.png' leaves"),
    ({"file_name": "/etc/passwd", "text": "x"}, r"the image '/etc/passwd' leaves"),
    ({"file_name": "sub/../../a.png", "text": "x"}, "leaves"),
    ({"file_name": "..\\train\\0.png", "text": "x"}, "leaves"),
    ({"file_name": "C:/0.png", "text": "x"}, "leaves"),
    ({"file_name": "9.png", "text": "x"}, r"metadata\.jsonl:9: there is no image '9\.png'"),
    ({"file_name": "0.pgn", "text": "x"}, r"no image '0\.pgn'.*Did you mean '0\.png'"),
    ({"file_name": "metadata.jsonl", "text": "x"}, "is not a readable image"),
    ({"file_name": ".", "text": "x"}, "there is no image"),
    ({"file_name": "0.png", "text": " "}, "1 of 9 rows lack file_name or text"),
    ({"file_name": "0.png", "txt": "x"}, r"no column 'text'.*Did you mean 'txt'"),
    ({"file_name": ["0.png", "1.png"], "text": "x"}, r"metadata\.jsonl:9: file_name holds 2 images, not one"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_metadata_is_one_error(pair_data: Path, line: dict[str, Any], message: str) -> None:
    with (pair_data / "test" / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=message):
        load_data(pair_data, task="captioning")


def test_folders_of_another_form(pair_data: Path, image_data: Path) -> None:
    with pytest.raises(DataError, match=r"train has no metadata\.jsonl"):
        load_data(image_data, task="image-text-retrieval")
    with pytest.raises(DataError, match="not one folder of images per class"):
        load_data(pair_data, task="image-classification")


class Embedded(nn.Module):
    """Gives rows the embeddings it is told."""

    def __init__(self, images: list[list[float]], texts: list[list[float]]) -> None:
        super().__init__()
        self.sides = torch.tensor(images), torch.tensor(texts)

    def forward(self, at: torch.Tensor) -> Any:
        """Return the embeddings of the rows `at`."""
        return SimpleNamespace(image_embeds=self.sides[0][at], text_embeds=self.sides[1][at])


def found(images: list[list[float]], texts: list[list[float]], words: list[str]) -> Any:
    """Score told embeddings, two rows at a time."""
    batches = [{"at": torch.arange(i, min(i + 2, len(words))), "return_loss": True} for i in range(0, len(words), 2)]
    return retrieve(Embedded(images, texts), batches, words)


def test_recall_by_hand() -> None:
    x, y, z = [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]
    scores = found([x, y, y], [x, y, z], ["a", "b", "c"])
    assert scores.items == (1.0, 1.0, 0.0)  # the third image is nearer to "b" than to "c"
    assert scores.values == {
        "recall@1": pytest.approx(2 / 3), "recall@5": 1.0, "recall@10": 1.0,
        "text_to_image_recall@1": pytest.approx(1 / 3), "gallery": 3.0,
    }  # fmt: skip  # "b" and "c" are as near to the one image as to the other


def test_equal_texts_count_as_hits_and_once_in_the_gallery() -> None:
    x, y = [1.0, 0.0], [0.0, 1.0]
    scores = found([x, x, y], [x, x, y], ["A  cat", "a cat", "a dog"])
    assert scores.items == (1.0, 1.0, 1.0)
    assert scores.values["gallery"] == 2 and scores.values["text_to_image_recall@1"] == 1


def test_one_embedding_for_all_finds_nothing() -> None:
    scores = found([[1.0, 0.0]] * 3, [[1.0, 0.0]] * 3, ["a", "b", "c"])
    assert scores.items == (0.0, 0.0, 0.0) and scores.values["recall@5"] == 1


def test_gallery_of_one() -> None:
    for words in (["a cat"], ["a cat", "A cat"]):
        with pytest.raises(TrainError, match="have 1 different texts"):
            found([[1.0, 0.0]] * len(words), [[1.0, 0.0]] * len(words), words)


def test_retrieval_scores_are_the_models_similarities(dual: str, pair_data: Path) -> None:
    task, data = retrieval(dual, pair_data)
    assert any("text_projection.weight, visual_projection.weight" in note for note in task.notes)
    batch = next(task.batches(task.items(data.test), 8))
    assert batch["pixel_values"].shape == (8, 3, 56, 56)
    assert task.model(**batch).loss.item() > 0
    scores = task.score(task.items(data.test), batch_size=3)
    with torch.no_grad():
        near = task.model.eval()(**batch).logits_per_image.argmax(1)
    right = [data.test[i].target == data.test[int(j)].target for i, j in enumerate(near)]
    assert scores.items == tuple(map(float, right)) and scores.values["gallery"] == 4


def test_projections_are_drawn_with_the_runs_seed(dual: str, pair_data: Path) -> None:
    one, two, other = (retrieval(dual, pair_data, seed=s)[0].model.get_parameter("text_projection.weight")
                       for s in (0, 0, 1))  # fmt: skip
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_methods_train_what_joins_the_towers(dual: str, llava: str, pair_data: Path, method: str) -> None:
    for task, data in (retrieval(dual, pair_data), captioning(llava, pair_data)):
        joints = {s.path for s in task_head(task.model)}
        assert joints == ({"text_projection", "visual_projection"} if task.name == "image-text-retrieval" else
                          {f"model.multi_modal_projector.linear_{i}" for i in (1, 2)})  # fmt: skip
        few = {"length": 4} if method == "prefix_tuning" else {}  # the tiny decoder has 40 positions
        adapter = peftree.adapt(task.model, method, **few)
        assert joints <= {site.path for _, site, _ in adapter.entries}
        task.model(**next(task.batches(task.items(data.train), 8))).loss.backward()
        grads = {key.rpartition("/")[0]: p.grad for key, p in adapter.state().items()}
        for path in joints:
            assert any(k.rpartition("/")[0] == path and g is not None and bool(g.any()) for k, g in grads.items())


def test_a_model_without_the_mark_has_no_such_head(dual: str, llava: str) -> None:
    import transformers as tf

    for kind, folder in ((tf.AutoModel, dual), (tf.LlavaForConditionalGeneration, llava)):
        model = kind.from_pretrained(folder)
        model.config.fresh_modules = []
        assert task_head(model) == []


def test_caption_alone_is_in_the_loss(llava: str, pair_data: Path) -> None:
    task, data = captioning(llava, pair_data)
    rows = [data.train[0], data.train[1]._replace(target="w1 w2 film w3 w4")]
    items = task.items(rows)
    batch = task.collate([items[0], items[1]])
    image = task.model.config.image_token_id  # type: ignore[union-attr]
    assert [i for i in items[0]["input_ids"] if i != image] == task.ids("Caption: a good film") + task.ending
    assert items[0]["input_ids"][:16] == [image] * 16 and len(items[0]["labels"]) == len(items[0]["input_ids"])
    assert batch["labels"][0][batch["labels"][0] != -100].tolist() == task.ids("a good film") + task.ending
    assert batch["labels"].shape == (2, 7) and int((batch["labels"][1] != -100).sum()) == 6
    with torch.no_grad():
        net: Any = task.model.eval()
        assert net(**batch).logits.shape[:2] == (2, 7)
        whole = {k: v for k, v in batch.items() if k not in ("labels", "logits_to_keep")}
        assert torch.allclose(net(**batch).logits, net(**whole).logits[:, -7:], atol=1e-6)


def test_captioning_scores_are_the_models_own_loss(llava: str, pair_data: Path) -> None:
    task, data = captioning(llava, pair_data)
    scores = task.score(task.items(data.test), batch_size=3)
    assert (scores.metric, scores.aggregate, scores.higher_is_better) == ("perplexity", "exp_mean", False)
    for i, row in enumerate(data.test):
        with torch.no_grad():
            loss = task.model.eval()(**task.collate([task.items([row])[0]])).loss
        assert scores.items[i] == pytest.approx(float(loss), rel=1e-5)


def test_shuffled_images_are_a_control(llava: str, pair_data: Path) -> None:
    task, data = captioning(llava, pair_data)
    items = task.items(data.test)
    other = items.shuffled()
    assert other and sorted(other.order) == list(range(8)) and all(i != j for i, j in enumerate(other.order))
    again, third = items.shuffled(), items.shuffled(seed=1)
    assert again and third and other.order == again.order != third.order
    assert other[0]["input_ids"] == items[0]["input_ids"]
    assert torch.equal(other[0]["pixel_values"], items[other.order[0]]["pixel_values"])
    scores = task.score(items)
    assert scores.values["shuffled_perplexity"] != scores.score
    assert "shuffled_perplexity" not in task.score(task.items(data.test[:1])).values
    with torch.no_grad():  # a projector that is blind
        for name, parameter in task.model.named_parameters():
            if "linear_2" in name:
                parameter.zero_()
    blind = task.score(items)
    assert blind.values["shuffled_perplexity"] == pytest.approx(blind.score, rel=1e-6)


def test_captions_are_written_out(llava: str, pair_data: Path) -> None:
    task, data = captioning(llava, pair_data, generate=3)
    values = task.score(task.items(data.test)).values
    assert 0 <= values["rouge_l"] <= 1 and 0 <= values["chrf"] <= 100 and values["exact"] in {0, 1 / 3, 2 / 3, 1}


def test_long_captions_and_captions_without_tokens(llava: str, pair_data: Path) -> None:
    task, _ = captioning(llava, pair_data, max_length=20)
    image = str(pair_data / "train" / "0.png")
    feature = task.items([Example(image, "w1 w2 w3 w4 w5", "here")])[0]
    assert len(feature["input_ids"]) == 20 and feature["input_ids"][:17] == task.front
    assert any("1 of 1 completions" in note for note in task.notes)
    plain = task.tokenizer
    task.tokenizer = lambda text, **more: {"input_ids": [] if "film" in text else plain(text, **more)["input_ids"]}
    with pytest.raises(DataError, match=r"here: 'film' has no token"):
        task.items([Example(image, "film", "here")])
    with pytest.raises(ConfigError, match=r"max_length=18: the image and its prompt take 17 tokens"):
        captioning(llava, pair_data, max_length=18)


def test_models_that_do_not_fit(dual: str, llava: str, encoder: str, pair_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"LlavaModel, not a dual encoder"):
        retrieval(llava, pair_data)
    with pytest.raises(ConfigError, match="is of type vision-text-dual-encoder, which does not write"):
        captioning(dual, pair_data)
    with pytest.raises(ConfigError, match="not a dual encoder"):
        retrieval(encoder, pair_data)
    with pytest.raises(ConfigError, match=r"image_size=30 is not a multiple of the patch size 14"):
        retrieval(dual, pair_data, image_size=30)


@pytest.mark.parametrize("name", quick(["captioning", "image-text-retrieval"]))
def test_run_learns_and_opens_again(dual: str, llava: str, pair_data: Path, tmp_path: Path, name: str) -> None:
    config = RunConfig(
        model=llava if name == "captioning" else dual, data={"train": str(pair_data)}, task=name, batch_size=16,
        output=str(tmp_path / "out"), steps=80, lr=1e-3, quiet=True, eval_every=0, save_every=0, image_size=28,
        method="full",
    )  # fmt: skip
    result = run(config)
    losses = [point.loss for point in result.curve if point.loss is not None]
    assert losses[-1] < 0.75 * losses[0]
    assert open_run(tmp_path / "out").score().score == pytest.approx(result.score, rel=1e-5)
    if name == "captioning":
        assert result.base_score is not None and result.score < result.base_score / 3
