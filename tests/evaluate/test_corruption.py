"""Image corruptions: shape, range, growth with severity, shared copies."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate import tiny
from peftree.evaluate.corruption import CORRUPTIONS, corrupt
from peftree.probes import run_probes
from peftree.probes.corruptions import copy


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Return a picture with shades, edges and texture."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    shade = np.stack([0.2 + 0.6 * y, 0.3 + 0.4 * x, 0.5 + 0.3 * np.sin(6 * x * y + seed)], 2)
    for _ in range(4):
        cy, cx, r = draw.random(3) * [1, 1, 0.3]
        shade[np.hypot(y - cy, x - cx) < r] = draw.random(3)
    shade += 0.05 * draw.standard_normal(shade.shape)
    return Image.fromarray((shade.clip(0, 1) * 255).astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as file:
        assert file.mode == "RGB" and file.format == "PNG"
        return np.asarray(file, dtype=np.float64)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(("height", "width"), [(28, 28), (72, 60), (150, 200)])
def test_distortion_grows_with_severity(kind: str, height: int, width: int) -> None:
    far = np.zeros(5)
    for seed in range(4):
        data = encoded(picture(height, width, seed))
        copies = [pixels(corrupt(data, kind, severity)) for severity in range(5)]
        assert all(c.shape == (height, width, 3) for c in copies)
        far += [np.square(c - pixels(data)).mean() for c in copies]
    assert far[0] > 0 and (np.diff(far) > 0).all()
    noise_ratio = 10 * np.log10(255**2 / (far / 4))
    assert noise_ratio[0] < 45 and noise_ratio[4] > 5  # it is seen at once, and some of the picture always stays


def test_the_same_bytes_give_the_same_copy_and_others_another() -> None:
    a, b = encoded(picture(40, 40, 0)), encoded(picture(40, 40, 1))
    for kind in CORRUPTIONS:
        assert corrupt(a, kind, 2) == corrupt(a, kind, 2)
        assert corrupt(a, kind, 2) != corrupt(b, kind, 2)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_modes(mode: str) -> None:
    data = encoded(picture(20, 30, 0).convert(mode))
    for kind in CORRUPTIONS:
        assert pixels(corrupt(data, kind, 4)).shape == (20, 30, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
def test_the_smallest_images(size: tuple[int, int]) -> None:
    for value in (0, 255):
        data = encoded(Image.new("RGB", size, (value,) * 3))
        for kind in CORRUPTIONS:
            assert pixels(corrupt(data, kind, 4)).shape == (size[1], size[0], 3)


def test_brightness_keeps_the_hue() -> None:
    data = encoded(Image.new("RGB", (4, 4), (40, 80, 20)))
    assert pixels(corrupt(data, "brightness", 0))[0, 0] == pytest.approx(
        [40 * 105.5 / 80, 105.5, 20 * 105.5 / 80], abs=1
    )


def test_copies_are_made_once_and_shared(tmp_path: Path) -> None:
    one = tiny.subject("vit", "lora", tmp_path)
    settings = {"corruptions": {"limit": 1}}
    first = run_probes(one, settings)["corruptions"]
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("corruptions-*/*/*.png")}
    assert len(made) == 12 * 5
    other = run_probes(tiny.subject("vit", "vpt", tmp_path), settings)["corruptions"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("corruptions-*/*/*.png")} == made
    assert isinstance(first["kinds"], dict) and isinstance(other["severities"], list)
    assert list(first["kinds"]) == list(CORRUPTIONS) and len(other["severities"]) == 5


def test_a_copy_lies_where_its_content_says(tmp_path: Path) -> None:
    data = encoded(picture(20, 20, 0))
    path = copy(data, "fog", 1, tmp_path)
    assert path.read_bytes() == corrupt(data, "fog", 1) and path.parent.name == "fog-2"
