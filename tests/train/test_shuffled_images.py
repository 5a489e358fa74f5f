"""The control with shuffled images: who exchanges with whom, that answers stay, models that look and that do not."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from peftree.bench.cell import _subject
from peftree.cli import app
from peftree.data.chats import IMAGE, Turn
from peftree.data.exchange import given, partners, same
from peftree.data.rows import Example, load_data
from peftree.evaluate.quality import Scores
from peftree.evaluate.subject import UNMEASURED
from peftree.probes import Scale, run_probes
from peftree.probes.shuffled import Found, Shuffled
from peftree.settings import RunConfig
from peftree.train.run import OpenRun, open_run, run
from train.seeing import saved
from train.test_image_text import rows as written
from train.test_image_text import task

Keys = list[tuple[str, ...]]


def most(keys: Keys) -> int:
    """Return how many rows can take part, by trying every permutation."""
    counts = []
    for order in itertools.permutations(range(len(keys))):
        moved = [(here, there) for here, there in enumerate(order) if here != there]
        if all(len(keys[a]) == len(keys[b]) > 0 and keys[a] != keys[b] for a, b in moved):
            counts.append(len(moved))
    return max(counts)


def test_as_many_rows_exchange_as_can_and_none_keeps_its_images() -> None:
    """Every permutation of up to six rows is the oracle."""
    draw, partial = random.Random(0), 0
    for _ in range(150):
        keys: Keys = [tuple(draw.choices("abc", k=draw.choice([0, 1, 1, 1, 2]))) for _ in range(draw.randint(1, 6))]
        found = partners(keys, seed=draw.randint(0, 9))
        assert sorted(found) == sorted(found.values()) == sorted(set(found))
        assert all(keys[a] != keys[b] and len(keys[a]) == len(keys[b]) > 0 for a, b in found.items())
        assert len(found) == most(keys), keys
        partial += 0 < len(found) < len(keys)
    assert partial > 20


def test_the_seed_draws_who_exchanges() -> None:
    keys = [(str(n),) for n in range(20)]
    assert partners(keys) == partners(keys) != partners(keys, seed=1)
    drawn = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    assert partners(keys) == dict(sorted(zip(drawn, drawn[1:] + drawn[:1], strict=True)))
    assert len(partners([("a",)] * 9 + [("b",)])) == 2 and partners([("a",)] * 3) == {} == partners([])


def test_the_same_bytes_are_the_same_image(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    a, b, c = (Example(str(tmp_path / f"{name}.png"), "x", name) for name in "abc")
    assert same(a) == same(b) != same(c)
    assert len(partners([same(row) for row in (a, b, c)])) == 2
    assert given(a, c) == a._replace(source=c.source)


def test_images_come_where_those_of_the_row_were() -> None:
    turns = (
        Turn("user", f"{IMAGE}{IMAGE}?", images=("a", "b")),
        Turn("assistant", "x"),
        Turn("user", f"{IMAGE}?", images=("c",)),
    )
    other = (Turn("user", f"{IMAGE}", images=("d",)), Turn("user", f"{IMAGE}{IMAGE}", images=("e", "f")))
    moved = given(Example("q", "y", "w", turns), Example("r", "z", "v", other))
    assert [turn.images for turn in moved.turns] == [("d", "e"), (), ("f",)]
    assert [turn._replace(images=()) for turn in moved.turns] == [turn._replace(images=()) for turn in turns]


def squares(folder: Path, count: int) -> list[str]:
    """Write dark and light images in turn, with noise, of two sizes."""
    folder.mkdir(exist_ok=True)
    names = []
    for n in range(count):
        low = (0, 170)[n % 2]
        pixels = np.random.default_rng(n).integers(low, low + 80, (30 + 30 * (n // 2 % 2), 40, 3), dtype=np.uint8)
        names.append(f"{n}.png")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on answers that the image tells, and on answers that the question tells."""
    folder = tmp_path_factory.mktemp("runs")
    names, model = squares(folder / "data", 16), saved("llava", folder / "model")
    found = {}
    for kind in ("seen", "asked"):
        lines = [
            {"image": name, "question": ("m", "w")[n // 2 % 2], "answer": "zj"[(n if kind == "seen" else n // 2) % 2]}
            for n, name in enumerate(names)
        ]
        path = written(folder / "data", lines, f"{kind}.jsonl")
        run(RunConfig(
            model=model, data={"train": str(path), "valid": str(path)}, steps=60, batch_size=16, lr=5e-3, quiet=True,
            output=str(folder / kind), method="full", base_score=False, eval_every=0, save_every=0,
        ))  # fmt: skip
        found[kind] = folder / kind
    return found


def probed(opened: OpenRun, folder: Path, **settings: Any) -> dict[str, Any]:
    return run_probes(_subject({}, opened, folder), {"shuffled": settings})["shuffled"]


def test_a_model_that_looks_loses_and_one_that_does_not_stays(finished: dict[str, Path], tmp_path: Path) -> None:
    found = {kind: probed(open_run(folder), tmp_path) for kind, folder in finished.items()}
    seen, asked = found["seen"], found["asked"]
    assert seen["own"] < 1.5 and seen["shuffled"] > 2 * seen["own"] and seen["low"] > 0 and seen["looks"] == "shown"
    assert asked["own"] < 1.5 and asked["shuffled"] == pytest.approx(asked["own"], rel=0.05)
    assert seen["items"] == asked["items"] == 16
    opened = open_run(finished["seen"])
    with torch.no_grad():  # what reaches the text of an image is blind
        for name, parameter in opened.task.model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.zero_()
    blind = probed(opened, tmp_path)
    assert blind["change"] == pytest.approx(0, abs=1e-6) and blind["looks"] == "not shown"
    assert blind["own"] == pytest.approx(blind["shuffled"], rel=1e-6)


def test_the_control_is_the_score_of_rows_that_name_the_other_images(finished: dict[str, Path], tmp_path: Path) -> None:
    """The oracle is a file whose rows name the images that they get."""
    opened, folder = open_run(finished["seen"]), finished["seen"].parent / "data"
    lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    order = partners([same(row) for row in opened.data.valid])
    moved = [{**line, "image": lines[order[n]]["image"]} for n, line in enumerate(lines)]
    data = load_data(written(folder, moved, "moved.jsonl"), valid=folder / "moved.jsonl")
    found = probed(opened, tmp_path)
    assert found["shuffled"] == pytest.approx(opened.score_rows(data.valid).score, rel=1e-5)
    assert found["own"] == pytest.approx(opened.score().score, rel=1e-6)
    some = probed(opened, tmp_path, limit=4)
    assert some["items"] == 4


def test_rows_that_cannot_exchange_are_left_out_of_both_scores(finished: dict[str, Path], tmp_path: Path) -> None:
    opened, folder = open_run(finished["seen"]), finished["seen"].parent / "data"
    names = ["0.png"] * 5 + ["1.png", "3.png"]
    lines = [{"image": name, "question": "m", "answer": "z" if name == "0.png" else "j"} for name in names]
    own = load_data(written(folder, lines, "few.jsonl"), valid=folder / "few.jsonl")
    few = OpenRun(opened.config, opened.task, opened.adapter, own)
    found = probed(few, tmp_path)
    chosen = partners([same(row) for row in own.valid])
    assert found["items"] == 4 == len(chosen)
    kept = opened.score_rows([own.valid[n] for n in chosen])
    assert found["own"] == pytest.approx(kept.score, rel=1e-5)
    alone = OpenRun(
        opened.config,
        opened.task,
        opened.adapter,
        load_data(written(folder, lines[:5], "one.jsonl"), valid=folder / "one.jsonl"),
    )
    assert probed(alone, tmp_path) == {UNMEASURED: "No two rows have different images, as many each."}


@pytest.mark.parametrize("family", ["qwen2_vl", "idefics3"])
def test_answers_stay_to_the_token_where_images_take_other_room(family: str, tmp_path: Path) -> None:
    """Its images take more or fewer tokens by their size, so a row may come out longer than `max_length`."""
    made, _ = task(family)
    sizes = ((20, 60), (60, 60))
    data = []
    for n in range(4):
        pixels = np.random.default_rng(n).integers(0, 255, (*sizes[n % 2], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        turns = (Turn("user", f"{IMAGE}Which?", images=(str(tmp_path / f"{n}.png"),)), Turn("assistant", f"a{n}"))
        data.append(Example("Which?", f"a{n}", f"row {n}", turns))
    others = [data[n ^ 1] for n in range(4)]
    own = [made.features([row])[0] for row in data]
    assert len({f["start"] for f in own}) == 2
    made.length = min(len(f["input_ids"]) for f in own) + 1
    short = [row for row, f in zip(data, own, strict=True) if len(f["input_ids"]) <= made.length]
    longer = [others[data.index(row)] for row in short]
    items = made.exchanged(short, longer)
    for n, (row, other) in enumerate(zip(short, longer, strict=True)):
        assert len(items[n]["input_ids"]) > made.length and items[n]["images"] == other.turns[0].images
        before = own[data.index(row)]
        assert [x for x in items[n]["labels"] if x != -100] == [x for x in before["labels"] if x != -100]
        assert items[n]["target"] == before["target"]
    scores = made.score_exchanged(short, longer, 2)
    assert isinstance(scores, Scores) and len(scores.items) == len(short) == 2
    made.length = 512
    moved = [given(row, other) for row, other in zip(short, longer, strict=True)]
    assert scores.items == pytest.approx(made.score(made.items(moved)).items, rel=1e-5)


def test_captions_have_the_probe_and_identical_images_no_control_of_their_own(
    llava: str, pair_data: Path, tmp_path: Path
) -> None:
    run(RunConfig(
        model=llava, data={"train": str(pair_data)}, task="captioning", steps=2, batch_size=4, image_size=28,
        output=str(tmp_path / "o"), quiet=True, base_score=False, eval_every=0, save_every=0,
    ))  # fmt: skip
    opened = open_run(tmp_path / "o")
    found = probed(opened, tmp_path)
    assert found["shuffled"] == pytest.approx(opened.score().values["shuffled_perplexity"], rel=1e-5)
    twice = [row._replace(source=opened.data.test[n // 2].source) for n, row in enumerate(opened.data.test)]
    values = opened.score_rows(twice).values
    order = partners([same(row) for row in twice])
    wanted = opened.score_rows([given(twice[n], twice[order[n]]) for n in range(8)])
    assert all(twice[n].source != twice[order[n]].source for n in range(8))
    assert values["shuffled_perplexity"] == pytest.approx(wanted.score, rel=1e-5)
    single = [row._replace(source=opened.data.test[0].source) for row in opened.data.test[:5]]
    assert "shuffled_perplexity" not in opened.score_rows([*single, *opened.data.test[5:7]]).values


def test_eval_states_it(finished: dict[str, Path]) -> None:
    shown = CliRunner().invoke(app, ["eval", str(finished["seen"]), "--json"], catch_exceptions=False)
    found = json.loads(shown.stdout)
    assert found["images_own"] == pytest.approx(found["new"], rel=1e-6) and found["images_items"] == 16
    assert found["images_shuffled"] > 2 * found["images_own"] and found["images_looks"] == "shown"
    text = CliRunner().invoke(app, ["eval", str(finished["seen"]), "--split", "train"], catch_exceptions=False).stdout
    assert "images_shuffled" in text and "images_looks" in text


def test_the_table_has_the_scores_and_the_change() -> None:
    found = Found(own=1.25, shuffled=9.5, change=2.028, low=1.5, high=2.5, looks="shown", items=16)
    cells = [cell.main for cell in Shuffled.sheet.fill(found, Scale(2, -1.0))]
    assert cells == ["1.25", "9.50", "+2.028", "16"] and len(cells) == len(Shuffled.sheet.heads)


def test_other_tasks_have_none(vit: str, image_data: Path, tmp_path: Path) -> None:
    run(RunConfig(model=vit, data={"train": str(image_data)}, steps=1, output=str(tmp_path / "o"), quiet=True))
    found = probed(open_run(tmp_path / "o"), tmp_path)
    assert found == {UNMEASURED: "The probe is for captioning, image-text-to-text, not image-classification."}
    assert not [k for k in _eval(tmp_path / "o") if k.startswith("images_")]


def _eval(folder: Path) -> Sequence[str]:
    shown = CliRunner().invoke(app, ["eval", str(folder), "--json"], catch_exceptions=False)
    return list(json.loads(shown.stdout))
