"""An image as people see it: upright, eight bits per colour, on white where it is transparent; a file, or its bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from peftree.errors import DataError
from peftree.files import sha256

FILES = ("image", "images", "file_name")  # the columns that hold images


class Held(str):
    """An image that a row holds, where others have the path of one; as a text it says what its content is.

    Attributes:
        data: the bytes of its file, which are decoded when a batch is made.
    """

    data: bytes

    def __new__(cls, data: bytes) -> Self:
        made = super().__new__(cls, f"image of sha256 {sha256(data)}")
        made.data = data
        return made

    def __reduce__(self) -> tuple[type[Held], tuple[bytes]]:
        return Held, (self.data,)


def images_in(value: object, name: str, where: str) -> list[str]:
    """Return the images of a cell: paths as they are, bytes as `Held`, and an empty text for one that is missing.

    Bytes come plain or as `datasets.Image` keeps them, `{bytes, path}`; a list holds several images.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, list | tuple):
        return [image for each in value for image in images_in(each, name, where)]
    if isinstance(value, Mapping) and value and {"bytes", "path"} >= value.keys():
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or isinstance(value, str) or value != value:  # NaN is a missing one too
        return [value if isinstance(value, str) else ""]
    if isinstance(value, bytes):
        return [Held(value) if value else ""]
    raise DataError(
        f"{where}: {name} is {str(value)[:80]}, not an image.", "Give the path of its file, or the file's bytes."
    )


def holds(value: object) -> bool:
    """Whether a cell has the type of images that a row holds."""
    if isinstance(value, list | tuple):
        return bool(value) and holds(value[0])
    return isinstance(value, bytes) or (isinstance(value, Mapping) and set(value) == {"bytes", "path"})


def content(image: str) -> bytes:
    """Return the bytes of an image's file."""
    return image.data if isinstance(image, Held) else Path(image).read_bytes()


def opened(image: str | IO[bytes]) -> Any:
    """Return an image as Pillow opens it, not decoded yet."""
    from PIL import Image

    return Image.open(io.BytesIO(image.data) if isinstance(image, Held) else image)


def broken(name: str, error: Exception) -> DataError:
    """Return the error for what Pillow does not read."""
    why = str(error).partition(" <_io")[0].rstrip(".")
    return DataError(f"{name} is not a readable image: {why}.", "Replace or remove it.")


def read_picture(source: str | IO[bytes]) -> Any:
    """Return an image as an RGB `PIL.Image`: turned as its EXIF says, 16-bit grey scaled to 8, transparency on white.

    Raises:
        OSError, ValueError, SyntaxError: from Pillow, if it is not an image.
    """
    from PIL import Image, ImageOps

    with opened(source) as file:
        image: Any = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255; "I" has room for more
        values = np.asarray(image).astype(np.float64)
        top = 255 if values.max(initial=0) <= 255 and image.mode == "I" else 65535
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
