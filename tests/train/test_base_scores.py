"""The base's scores between runs: found again only if everything that they depend on is the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from peftree.adapter import adapt, disabled
from peftree.data.thinning import rows_of
from peftree.evaluate.quality import Scores
from peftree.settings import RunConfig, load_config
from peftree.tasks import Task, build_task
from peftree.train import base
from peftree.train.run import _options, run


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of scores, which these tests keep."""
    monkeypatch.setenv(base.OFF, "1")
    monkeypatch.setenv("PEFTREE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scores"


class Scorer:
    """A task with its adapted model, and how often it scored."""

    def __init__(self, model: str, data: Path, *words: str) -> None:
        self.config = load_config(None, [f"model={model}", f"data={data}", "threads=1", *words])
        rows = rows_of(self.config)
        torch.manual_seed(0)
        self.task: Task = build_task(model, rows, _options(self.config))
        self.items = self.task.items(rows.test)
        adapt(self.task.model, "lora", name="default", head=self.config.head)
        self.times = 0

    def __call__(self) -> tuple[Scores, bool]:
        return base.base_scores(self.config, self.task, self.items, self._measure)

    def _measure(self) -> Scores:
        self.times += 1
        torch.rand(1)
        with disabled(self.task.model):
            return self.task.score(self.items, self.config.eval_batch_size)


def settings(model: str, data: Path, out: Path, *more: str) -> RunConfig:
    words = ["steps=2", "batch_size=4", "threads=1", "quiet=true", "save_every=0", *more]
    return load_config(None, [f"model={model}", f"data={data}", f"output={out}", *words])


@pytest.mark.parametrize(("model", "data"), [("encoder", "review_data"), ("decoder", "prompt_data")])
def test_a_second_run_takes_the_scores_of_the_first_and_trains_alike(
    model: str, data: str, request: pytest.FixtureRequest, tmp_path: Path, folder: Path
) -> None:
    made, rows = request.getfixturevalue(model), request.getfixturevalue(data)
    one, two = (run(settings(made, rows, tmp_path / name)) for name in ("one", "two"))
    assert (one.base_known, two.base_known) == (False, True) and len(list(folder.iterdir())) == 1
    assert (one.base_score, one.base_items, one.base_values) == (two.base_score, two.base_items, two.base_values)
    assert (one.score, one.items, one.curve) == (two.score, two.items, two.curve)
    third = run(settings(made, rows, tmp_path / "three", "r=2", "lr=0.1"))  # another adapter on the same base
    assert third.base_known and third.base_items == one.base_items
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["base_known"] is True


Change = Callable[[Scorer, pytest.MonkeyPatch], object]


def weight(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        next(p for n, p in scorer.task.model.named_parameters() if n.endswith("key.weight")).view(-1)[3] += 1e-3


def head(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = scorer.task.model
    with torch.no_grad():
        net.classifier.bias[0] += 1e-3


def row(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    items: Any = scorer.items
    items.features[-1] = items.features[-1] | {"labels": 1 - items.features[-1]["labels"]}


def order(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    items: Any = scorer.items
    items.features[:2] = items.features[1::-1]


def of_model(name: str, value: Any) -> Change:
    return lambda scorer, _: setattr(scorer.task.model.config, name, value)


def of_run(name: str, value: Any) -> Change:
    return lambda scorer, _: setattr(scorer, "config", scorer.config.model_copy(update={name: value}))


def of_environment(name: str) -> Change:
    now = base.environment()
    return lambda _, monkeypatch: monkeypatch.setattr(base, "environment", lambda: now | {name: "other"})


CHANGES: dict[str, Change] = {
    "weight": weight, "head": head, "row": row, "order of rows": order,
    "buffer": lambda scorer, _: scorer.task.model.register_buffer("extra", torch.ones(1)),
    "config": of_model("layer_norm_eps", 0.5), "attention": of_model("_attn_implementation", "eager"),
    "source": lambda _, monkeypatch: monkeypatch.setattr(base, "_source", lambda: "other"),
    "products": lambda _, monkeypatch: monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
    "device": lambda _, monkeypatch: monkeypatch.setattr(base, "_device", lambda found: ["other"]),
    "dtype": of_run("dtype", "bfloat16"), "precision": of_run("precision", "bf16"),
    "scoring batch": of_run("eval_batch_size", 5), "length": of_run("max_length", 9),
    "labels": lambda scorer, _: setattr(scorer.task, "labels", ("a", "b")),
    **{name: of_environment(name) for name in ("peftree", "torch", "transformers", "threads", "processor")},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_a_miss(
    change: Change, encoder: str, review_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(encoder, review_data)
    first = scorer()
    assert scorer() == (first[0], True) and scorer.times == 1
    change(scorer, monkeypatch)
    assert not scorer()[1] and scorer.times == 2
    assert scorer()[1] and scorer.times == 2


def test_a_tokenizer_that_writes_texts_otherwise_is_a_miss(decoder: str, prompt_data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(decoder, tmp_path / "copy"))
    assert not Scorer(str(copy), prompt_data, "generate=2")()[1]
    assert Scorer(str(copy), prompt_data, "generate=2")()[1]
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_tokenization_spaces": True, "note": 1}))
    assert not Scorer(str(copy), prompt_data, "generate=2")()[1]


def test_the_files_may_lie_elsewhere_but_not_hold_other_weights(
    encoder: str, review_data: Path, tmp_path: Path
) -> None:
    assert not Scorer(encoder, review_data)()[1]
    copy = Path(shutil.copytree(encoder, tmp_path / "copy"))
    assert Scorer(str(copy), review_data)()[1]
    tensors = load_file(copy / "model.safetensors")
    name = next(n for n in tensors if n.endswith("query.weight"))
    tensors[name][1, 2] += 1e-3
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert not Scorer(str(copy), review_data)()[1]


def test_images_count_by_their_pixels(llava: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(name: str, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / name)

    data = tmp_path / "pairs"
    data.mkdir()
    for n in range(2):
        draw(f"{n}.png", n)
    rows = [json.dumps({"image": f"{n}.png", "question": "Q", "answer": "A"}) + "\n" for n in range(2)]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(rows))
    first = Scorer(llava, data)()
    assert not first[1] and Scorer(llava, data)() == (first[0], True)
    draw("1.png", 7)
    found, known = Scorer(llava, data)()
    assert not known and found.items[0] == first[0].items[0] and found.items[1] != first[0].items[1]
    monkeypatch.setattr(base, "beside", lambda model: {})  # as for a hub name: what reads the images is not known
    assert not any(Scorer(llava, data)()[1] for _ in range(2))


@pytest.mark.parametrize(
    "damage",
    [lambda text: "", lambda text: text[:-9], lambda text: text.replace("1.0", "0.0", 1), lambda text: "{}"],
    ids=["empty", "cut", "a figure", "nothing in it"],
)
def test_a_damaged_file_is_a_miss_and_written_again(
    damage: Callable[[str], str], encoder: str, review_data: Path, folder: Path
) -> None:
    scorer = Scorer(encoder, review_data)
    wanted = scorer()[0]
    [path] = folder.iterdir()
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    assert scorer() == (wanted, False) and path.read_text() == text


def test_several_writers_leave_one_whole_file(encoder: str, review_data: Path, folder: Path) -> None:
    scorer = Scorer(encoder, review_data)
    wanted = scorer()[0]
    [path] = folder.iterdir()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: base._write(path, wanted), range(40)))
    assert list(folder.iterdir()) == [path] and scorer() == (wanted, True)


def test_only_the_files_used_last_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MOST", 3)
    scores = Scores("accuracy", (1.0,), {"accuracy": 1.0})
    for number in range(5):
        base._write(folder / f"{number}.json", scores)
    assert len(list(folder.iterdir())) == 3


def test_none_are_kept_where_nobody_wants_it_or_where_the_key_is_not_known(
    encoder: str, review_data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(encoder, review_data)
    monkeypatch.setenv(base.OFF, "0")
    assert not scorer()[1] and not scorer()[1]
    monkeypatch.setenv(base.OFF, "1")

    class Own(torch.nn.Linear):
        """A module whose code no version tells."""

    net: Any = scorer.task.model
    net.own = Own(1, 1)
    assert not scorer()[1] and not scorer()[1] and scorer.times == 4 and not folder.exists()


def test_a_folder_that_cannot_be_written_to_is_no_fault(
    encoder: str, review_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTREE_CACHE", str(tmp_path / "file"))
    assert not Scorer(encoder, review_data)()[1]


def test_random_states_do_not_tell_a_hit_from_a_miss(encoder: str, review_data: Path) -> None:
    scorer = Scorer(encoder, review_data)
    before = torch.get_rng_state()
    assert not scorer()[1] and torch.equal(torch.get_rng_state(), before)
    assert scorer()[1] and torch.equal(torch.get_rng_state(), before)
