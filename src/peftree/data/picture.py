"""An image file as people see it: upright, eight bits per colour, on white where it is transparent."""

from __future__ import annotations

from typing import IO, Any

import numpy as np


def read_picture(source: str | IO[bytes]) -> Any:
    """Return a file as an RGB `PIL.Image`: turned as its EXIF says, 16-bit grey scaled to 8, transparency on white.

    Raises:
        OSError, ValueError, SyntaxError: from Pillow, if the file is not an image.
    """
    from PIL import Image, ImageOps

    with Image.open(source) as file:
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
