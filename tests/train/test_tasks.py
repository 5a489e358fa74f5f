"""Tasks: what rows become, what is in the loss, and how answers are scored."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from peftree.data.images import Look, read_pixels
from peftree.data.rows import Data, Example, load_data
from peftree.errors import ConfigError, DataError, TrainError
from peftree.evaluate.quality import complete, macro_f1
from peftree.tasks import Options, build_task
from peftree.tasks.generation import Generation
from peftree.tasks.image_classification import ImageClassification
from peftree.tasks.text_classification import TextClassification
from train.tiny import PIXELS, reviews, tokenizer, write_csv, write_jsonl

EOS = 2
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def generation(decoder: str, folder: Path, **options: Any) -> tuple[Generation, Data]:
    data = load_data(write_jsonl(folder / "a.jsonl", [("the film", "was good"), ("a", "bad cast w1 w2 w3")] * 5))
    task = build_task(decoder, data, Options(**options))
    assert isinstance(task, Generation)
    return task, data


def test_padding_is_masked_by_place_and_the_stop_token_is_a_label(decoder: str, tmp_path: Path) -> None:
    task, _ = generation(decoder, tmp_path)
    assert task.pad == EOS == task.stop
    items = task.items([Example("the film", "was good", ""), Example("a", "bad cast w1 w2 w3", "")])
    batch = task.collate([items[0], items[1]])
    for row, count in ((0, 3), (1, 6)):
        labels = batch["labels"][row]
        assert int((labels != -100).sum()) == count
        assert labels[labels != -100][-1] == EOS
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["input_ids"].shape == (2, 7)


def test_prompt_keeps_its_end_and_a_cut_completion_has_no_stop_token(decoder: str, tmp_path: Path) -> None:
    task, _ = generation(decoder, tmp_path, max_length=6)
    long = "w1 w2 w3 w4 w5 w6 film"
    items = task.items([Example(long, "good", ""), Example("a", "w1 w2 w3 w4 w5 w6 w7", "")])
    first, second = items[0], items[1]
    assert task.tokenizer.decode(first["input_ids"]).split()[-3:] == ["film", "good", "<eos>"]
    assert len(first["input_ids"]) == 6
    assert len(second["input_ids"]) == 6
    assert EOS not in second["labels"]
    assert any("1 of 2 completions" in n for n in task.notes)


def test_chat_template(decoder: str, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(decoder, folder)
    words = tokenizer(eos_is_pad=True)
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    task, _ = generation(str(folder), tmp_path, chat=True)
    prompt, completion, *_ = task.encode_row(Example("the film", "was good", "a:1"))
    assert task.tokenizer.decode(completion).split() == ["was", "good", "<eos>"]
    assert task.tokenizer.convert_ids_to_tokens(prompt)[1:3] == ["the", "film"]
    with pytest.raises(ConfigError, match="has no chat template"):
        generation(decoder, tmp_path, chat=True)


def test_generation_scores_are_the_models_own_loss(decoder: str, tmp_path: Path) -> None:
    task, data = generation(decoder, tmp_path)
    scores = task.score(task.items(data.train[:4]), batch_size=3)
    for i, row in enumerate(data.train[:4]):
        batch = task.collate([task.items([row])[0]])
        with torch.no_grad():
            assert scores.items[i] == pytest.approx(float(task.model(**batch).loss), rel=1e-5)
    assert scores.score == pytest.approx(np.exp(np.mean(scores.items)))


def test_exact_match_is_greedy_decoding(decoder: str, tmp_path: Path) -> None:
    task, _ = generation(decoder, tmp_path)
    model: Any = task.model
    prompt = task.encode("the film")[0]
    out = model.generate(torch.tensor([prompt]), max_new_tokens=3, min_new_tokens=3, do_sample=False)[0].tolist()
    good = {"input_ids": out, "labels": [-100] * len(prompt) + out[len(prompt) :]}
    bad = good | {"labels": [*good["labels"][:-1], 40]}
    scores = complete(model, [task.collate([good, bad])])
    assert scores.values["exact_match"] == 0.5
    assert scores.values["token_accuracy"] == pytest.approx((1 + 2 / 3) / 2)


def test_classifier_has_the_labels_and_is_the_same_for_a_seed(encoder: str, review_data: Path) -> None:
    data = load_data(review_data)
    one, two, other = (build_task(encoder, data, Options(seed=s)) for s in (0, 0, 1))
    assert isinstance(one, TextClassification)
    config: Any = one.model.config
    assert config.id2label == {0: "neg", 1: "pos"}
    assert any("classifier.weight" in n for n in one.notes)
    weights = [t.model.get_parameter("classifier.weight") for t in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_dropout_is_off_in_scores(encoder: str, review_data: Path) -> None:
    data = load_data(review_data)
    task = build_task(encoder, data)
    batch = task.collate([task.items(data.test)[i] for i in range(4)])
    task.model.train()
    assert not torch.equal(task.model(**batch).logits, task.model(**batch).logits)
    rows = task.items(data.test)
    assert task.score(rows) == task.score(rows)
    assert task.model.training


def test_labels_of_a_trained_classifier_keep_their_order(encoder: str, review_data: Path, tmp_path: Path) -> None:
    first = build_task(encoder, load_data(review_data))
    model: Any = first.model
    model.config.id2label, model.config.label2id = {0: "pos", 1: "neg"}, {"pos": 0, "neg": 1}
    model.save_pretrained(tmp_path / "trained")
    tokenizer().save_pretrained(tmp_path / "trained")
    again = build_task(str(tmp_path / "trained"), load_data(review_data))
    assert again.labels == ("pos", "neg")
    assert again.notes == []


def test_images_are_read_as_the_preprocessor_says(vit: str, image_data: Path) -> None:
    data = load_data(image_data)
    task = build_task(vit, data)
    assert isinstance(task, ImageClassification)
    assert task.look == Look(PIXELS, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 2)
    batch = task.collate([task.items(data.train)[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, PIXELS, PIXELS)
    assert task.score(task.items(data.test), batch_size=3).score in {i / 8 for i in range(9)}


def test_pixels_and_normalisation(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    look = Look(8, resample=0)
    found = read_pixels(str(tmp_path / "a.png"), look)
    assert found.shape == (3, 8, 8)
    assert found.flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([1.0, -1.0, -0.6])


def test_another_image_size_interpolates_positions(vit: str, image_data: Path) -> None:
    data = load_data(image_data)
    task = build_task(vit, data, Options(image_size=24))
    assert task.score(task.items(data.test)).metric == "accuracy"
    with pytest.raises(ConfigError, match=r"not a multiple of the patch size 8.*Use 24"):
        build_task(vit, data, Options(image_size=25))


def test_fields_of_the_models_config(encoder: str, review_data: Path) -> None:
    data = load_data(review_data)
    task = build_task(encoder, data, Options(config={"num_hidden_layers": 1}))
    assert len(task.model.get_submodule("bert.encoder.layer")) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("num_hidden_layer", 1, r"config.num_hidden_layer: BertConfig has no such field.*'(?P<key>num_hidden_layers)'"),
        ("num_hidden_layers", "abc", r"config\.num_hidden_layers='abc'.*like the model's own, (?P<value>\d+)"),
        ("id2label", 3, r"config\.id2label=3 is refused.*Leave it out"),
        ("num_attention_heads", 3, r"not a multiple.*Leave config\.num_attention_heads=3 out"),
        ("hidden_act", "foo", r"'foo'.*Leave config\.hidden_act='foo' out"),
    ],
)
def test_advice_on_a_bad_field_of_the_config_works(
    key: str, value: Any, remedy: str, encoder: str, review_data: Path
) -> None:
    data = load_data(review_data)
    with pytest.raises(ConfigError) as refused:
        build_task(encoder, data, Options(config={key: value}))
    found = re.search(remedy, str(refused.value))
    assert found and "safetensors" not in str(refused.value), refused.value
    named = {name: text for name, text in found.groupdict().items() if text}
    config = {named.get("key", key): int(named.get("value", value))} if named else {}  # nothing named: left out
    assert build_task(encoder, data, Options(config=config)).model


def test_half_precision_base(encoder: str, review_data: Path) -> None:
    task = build_task(encoder, load_data(review_data), Options(dtype="bfloat16"))
    assert next(task.model.parameters()).dtype == torch.bfloat16


def test_models_that_do_not_load(encoder: str, vit: str, review_data: Path, tmp_path: Path) -> None:
    data = load_data(review_data)
    with pytest.raises(ConfigError, match="is not a folder"):
        build_task(str(tmp_path / "none"), data)
    for typed in ("none/", "some/none/"):  # no name of a hub ends so
        with pytest.raises(ConfigError, match="is not a folder"):
            build_task(typed, data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="Check the folder"):
        build_task(str(tmp_path / "empty"), data)
    with pytest.raises(ConfigError, match=r"no tokenizer|does not|Unrecognized"):
        build_task(vit, data)
    with pytest.raises(ConfigError, match="the model takes 40 tokens"):
        build_task(encoder, data, Options(max_length=41))


def test_pickled_weights_are_not_read(encoder: str, review_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(encoder, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="must hold safetensors"):
        build_task(str(folder), load_data(review_data))


def test_tokens_without_an_embedding(encoder: str, tmp_path: Path) -> None:
    folder = tmp_path / "grown"
    shutil.copytree(encoder, folder)
    words = tokenizer()
    words.add_tokens([f"new{i}" for i in range(40)])
    words.save_pretrained(folder)
    data = load_data(write_csv(tmp_path / "a.csv", reviews(20)))
    with pytest.raises(DataError, match="The tokenizer has 77 tokens, but the model embeds 64"):
        build_task(str(folder), data)


@pytest.mark.parametrize("edited", [False, True])
def test_weights_of_other_shapes_are_refused(encoder: str, tmp_path: Path, edited: bool) -> None:
    """Else the base is new random tensors, and only a note says so."""
    folder, data = tmp_path / "model", load_data(write_csv(tmp_path / "a.csv", reviews(20)))
    shutil.copytree(encoder, folder)
    config = folder / "config.json"
    if edited:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    said = r"encoder.layer.0.intermediate.dense.bias is \[48\] in its files, but \[64\] by its config. "
    said += "Restore the weights' own config.json." if edited else "Leave config.intermediate_size=64 out."
    with pytest.raises(ConfigError, match=said):
        build_task(str(folder), data, Options(config={} if edited else {"intermediate_size": 64}))


def test_a_head_for_other_labels_is_new(encoder: str, tmp_path: Path) -> None:
    folder, rows = str(tmp_path / "model"), reviews(20)
    task = build_task(encoder, load_data(write_csv(tmp_path / "two.csv", rows)))
    task.model.save_pretrained(folder)  # type: ignore[operator]
    three = load_data(write_csv(tmp_path / "three.csv", [*rows, *[(f"plot {text}", "odd") for text, _ in rows]]))
    again = build_task(folder, three, Options(config={"hidden_dropout_prob": 0.0}))
    head = again.model.get_parameter("classifier.weight")
    assert head.shape == (3, 32)
    assert again.notes == ["new tensors, not in the model's files: classifier.bias [3], classifier.weight [3, 32]"]
    base = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(again.model.get_parameter(base), task.model.get_parameter(base))


def test_an_encoder_is_no_generator(encoder: str, prompt_data: Path) -> None:
    """Without a causal mask a token's loss is on what the model was shown; the loss would fall and teach nothing."""
    data = load_data(prompt_data)
    with pytest.raises(ConfigError, match="its tokens see the later ones"):
        build_task(encoder, data)
    build_task(encoder, data, Options(config={"is_decoder": True}))


def test_scores_refuse_what_is_not_finite(encoder: str, review_data: Path) -> None:
    data = load_data(review_data)
    task = build_task(encoder, data)
    with torch.no_grad():
        task.model.get_parameter("classifier.bias").fill_(float("nan"))
    with pytest.raises(TrainError, match="not finite"):
        task.score(task.items(data.test))
    with pytest.raises(TrainError, match="nothing to score"):
        complete(nn.Identity(), [])


def test_macro_f1_by_hand() -> None:
    # class 0: 2 * 1 / 3, class 1: 2 * 1 / 4, class 2: 0
    assert macro_f1([0, 1, 1], [0, 0, 1]) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert macro_f1([0, 1, 1, 2], [0, 0, 1, 1]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_settings_file_is_plain_json(vit: str) -> None:
    assert json.loads((Path(vit) / "preprocessor_config.json").read_text())["resample"] == 2
