"""What a model is given for an image file: what its own processor makes of it, upright and over white."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from peftree.data.images import Look, read_look, read_pixels
from peftree.data.picture import read_picture
from peftree.data.rows import load_data
from peftree.evaluate.corruption import corrupt
from peftree.tasks import Options, build_task

PROCESSORS: dict[str, dict[str, Any]] = {
    "squashed": {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}},
    "resized, then cropped": {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 24}, "do_center_crop": True,
        "crop_size": {"height": 16, "width": 16}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4],
    },
    "by its short side": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16},
    "by a share": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 16}, "crop_pct": 0.5},
    "not normalised": {"image_processor_type": "ViTImageProcessor", "size": 16, "do_normalize": False},
    "of an old name": {"feature_extractor_type": "ViTFeatureExtractor", "size": 16, "resample": 0},
}  # fmt: skip


def noise(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def with_processor(vit: str, settings: dict[str, Any], folder: Path) -> Path:
    shutil.copytree(vit, folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder / "model"


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("wanted", [None, 24])
def test_pixels_are_those_of_the_models_own_processor(name: str, wanted: int | None, vit: str, tmp_path: Path) -> None:
    settings = PROCESSORS[name]
    model, file = with_processor(vit, settings, tmp_path), noise(tmp_path / "a.png")
    look = read_look(str(model), True, None, wanted)
    if wanted:  # a model whose files say so from the beginning
        told = {"size": {"height": 24, "width": 24}}
        told |= {"size": {"shortest_edge": 24}} if "by" in name else {}
        told |= {"size": {"shortest_edge": 36}} if "then" in name else {}
        told |= {"crop_size": {"height": 24, "width": 24}} if "crop_size" in settings else {}
        (model / "preprocessor_config.json").write_text(json.dumps(settings | told))
    oracle = AutoImageProcessor.from_pretrained(model)(images=Image.open(file), return_tensors="pt")["pixel_values"][0]
    assert look.size == (wanted or 16) and oracle.shape == (3, look.size, look.size)
    assert torch.equal(read_pixels(str(file), look), oracle)
    assert f"{look.size} x {look.size} pixels by the model's own" in look.told()


def test_without_a_processor_ours(vit: str, image_data: Path, tmp_path: Path) -> None:
    model = with_processor(vit, {}, tmp_path)
    (model / "preprocessor_config.json").unlink()
    task = build_task(str(model), load_data(image_data))
    assert any("16 x 16 pixels by short side and cropped" in note for note in task.notes)
    keeps = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 16}, "do_center_crop": False}
    (model / "preprocessor_config.json").write_text(json.dumps(keeps))  # unlike shapes make no batch
    assert read_look(str(model), True, None, None).processor is None
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor", "size": 16}')
    assert read_look(str(model), True, None, None) == Look(16)


def test_a_run_says_the_size(vit: str, image_data: Path) -> None:
    task = build_task(vit, load_data(image_data), Options(image_size=24))
    assert any("24 x 24 pixels by the model's own ViTImageProcessor" in note for note in task.notes)


def shown(path: Path) -> Any:
    return np.asarray(read_picture(str(path))).astype(int)


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_upright(turn: int, tmp_path: Path) -> None:
    """Pillow itself writes what a viewer shows for each of the eight orientations."""
    image = Image.new("RGB", (8, 4))
    image.paste((255, 0, 0), (0, 0, 2, 2))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    undo = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}[turn]
    wanted = image
    for method in undo:
        wanted = wanted.transpose(Image.Transpose(method))
    assert (shown(tmp_path / "a.png") == np.asarray(wanted)).all()
    same = np.asarray(Image.open(io.BytesIO(corrupt((tmp_path / "a.png").read_bytes(), "brightness", 0))))
    assert same.shape == np.asarray(wanted).shape


def test_sixteen_bits_of_grey(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png")[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "a.tiff")
    assert shown(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 1, 128, 255]
    Image.fromarray(np.array([[7, 200]], dtype=np.uint8)).save(tmp_path / "b.png")
    assert shown(tmp_path / "b.png")[0, :, 2].tolist() == [7, 200]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (40, 40, 40, 255))
    if mode == "P":
        flat = Image.new("P", (2, 1), 0)
        flat.putpalette([0, 0, 0, 40, 40, 40])
        flat.putpixel((1, 0), 1)
        flat.save(tmp_path / "a.png", transparency=0)
    else:
        image.convert(mode).save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png")[0].tolist() == [[255] * 3, [40] * 3]
