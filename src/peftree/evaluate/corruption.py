"""Twelve image corruptions at five severities, after Hendrycks & Dietterich 2019 (arXiv 1903.12261).

Lengths grow with the image, so small images are damaged as much as large ones. The parameters of noise, brightness,
contrast, pixelate and JPEG are those of ImageNet-C. It needs only Pillow, numpy and scipy; a copy's randomness comes
from the image's own bytes and the kind. Scores are not comparable with published ImageNet-C errors.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from peftree.data.picture import read_picture

Pixels = NDArray[np.float64]
"""`[height, width, 3]`, values in 0..1."""
Corruption = Callable[[Pixels, int, np.random.Generator], Pixels]


def corrupt(data: bytes, kind: str, severity: int) -> bytes:
    """Return a corrupted copy of an image file as an RGB PNG of the same size.

    Args:
        data: the bytes of an image file in any mode.
        kind: one of `CORRUPTIONS`.
        severity: 0 to 4.
    """
    from PIL import Image

    clean = np.asarray(read_picture(io.BytesIO(data)), dtype=np.float64) / 255
    seed = hashlib.sha256(kind.encode() + data).digest()
    draw = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    changed = np.clip(CORRUPTIONS[kind](clean, severity, draw), 0, 1)
    out = io.BytesIO()
    Image.fromarray((changed * 255).round().astype(np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _side(x: Pixels) -> int:
    height, width, _ = x.shape
    return int(min(height, width))


def gaussian_noise(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Add normal noise: too little light."""
    return x + draw.normal(size=x.shape) * (0.08, 0.12, 0.18, 0.26, 0.38)[severity]


def shot_noise(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Count photons: Poisson noise."""
    photons = (60, 25, 12, 5, 3)[severity]
    return draw.poisson(x * photons) / photons


def impulse_noise(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Set a share of the values to 0 or 1."""
    u, value = draw.random(x.shape), draw.integers(0, 2, x.shape)
    return np.where(u < (0.03, 0.06, 0.09, 0.17, 0.27)[severity], value, x)


def defocus_blur(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Blur with a disk."""
    radius = _side(x) * (0.02, 0.03, 0.04, 0.055, 0.07)[severity]
    reach = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
    return _filter(x, np.clip(radius + 0.5 - np.hypot(reach[:, None], reach), 0, 1))


def motion_blur(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Blur along a line of random direction."""
    half = _side(x) * (0.03, 0.05, 0.07, 0.09, 0.12)[severity] / 2
    angle = draw.uniform(0, np.pi)
    size = int(np.ceil(half)) + 1
    kernel = np.zeros((2 * size + 1, 2 * size + 1))
    for t in np.linspace(-half, half, 101):  # each point is shared among the four pixels around it
        row, column = size + t * np.sin(angle), size + t * np.cos(angle)
        r, c = int(row), int(column)
        weights = np.outer([r + 1 - row, row - r], [c + 1 - column, column - c])
        kernel[r : r + 2, c : c + 2] += weights
    return _filter(x, kernel)


def _filter(x: Pixels, kernel: Pixels) -> Pixels:
    out: Pixels = ndimage.convolve(x, (kernel / kernel.sum())[:, :, None], mode="reflect")
    return out


def brightness(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Raise the value of every pixel; keep hue and saturation."""
    value = x.max(2, keepdims=True)
    new = np.minimum(value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity], 1)
    out: Pixels = np.where(value > 0, x * new / np.where(value > 0, value, 1), new)
    return out


def contrast(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Move every value towards the mean of its channel."""
    mean: Pixels = x.mean((0, 1))
    return mean + (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[severity]


def fog(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Mix with a bright uneven haze: noise of several scales."""
    layers = [_smooth(x, draw, _side(x) * scale) * scale for scale in (0.25, 0.12, 0.06)]
    haze: Pixels = np.sum(layers, axis=0)
    haze = 0.65 + 0.35 * (haze - haze.min()) / max(float(np.ptp(haze)), 1e-9)
    share = (0.25, 0.37, 0.49, 0.61, 0.73)[severity]
    return (1 - share) * x + share * haze[:, :, None]


def _smooth(x: Pixels, draw: np.random.Generator, width: float) -> Pixels:
    """Return smooth noise of the image's size, scaled to a largest value of 1."""
    field: Pixels = ndimage.gaussian_filter(draw.normal(size=x.shape[:2]), width, mode="reflect")
    return field / max(float(np.abs(field).max()), 1e-9)


def pixelate(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Shrink the image and enlarge it again, in squares."""
    from PIL import Image

    factor = (0.6, 0.5, 0.4, 0.3, 0.25)[severity]
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    small = image.resize((max(1, int(x.shape[1] * factor)), max(1, int(x.shape[0] * factor))), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.NEAREST), dtype=np.float64) / 255


def jpeg(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Compress the image."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((x * 255).round().astype(np.uint8)).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity])
    with Image.open(file) as image:
        return np.asarray(image, dtype=np.float64) / 255


def elastic(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Stretch and press small regions."""
    far = _side(x) * (0.02, 0.03, 0.045, 0.06, 0.08)[severity]
    shift = [_smooth(x, draw, _side(x) * 0.06) * far for _ in range(2)]
    rows, columns = np.indices(x.shape[:2])
    places = [rows + shift[0], columns + shift[1]]
    return np.stack([ndimage.map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(3)], 2)


def occlusion(x: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Cover a square with grey, always around the same point."""
    out = x.copy()
    share = (0.05, 0.1, 0.2, 0.3, 0.4)[severity] ** 0.5
    spans = []
    for side in x.shape[:2]:
        size = max(1, round(side * share))
        start = min(max(0, round(draw.uniform(0, side) - size / 2)), side - size)
        spans.append(slice(start, start + size))
    out[spans[0], spans[1]] = 0.5
    return out


CORRUPTIONS: dict[str, Corruption] = {
    f.__name__: f
    for f in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, motion_blur, brightness, contrast, fog, pixelate,
        jpeg, elastic, occlusion,
    )
}  # fmt: skip
