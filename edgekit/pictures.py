"""From an encoded picture to the tensor that a model was trained on: the same on the workstation and on the device."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

from edgekit.errors import InputError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from PIL import Image

    from edgekit.manifest import ImagePreprocess
    from edgekit.tensors import Array

MAX_PIXELS = 64_000_000
"""A picture that claims more is refused before it is decoded: a few bytes of PNG can claim gigabytes."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is decoded. Pillow knows forty more, among them EPS, for which it starts Ghostscript."""
ORIENTATION = 0x0112


def picture_to_tensor(data: bytes, how: ImagePreprocess) -> Array:
    """Decode, resize the shorter side, crop the centre, normalize: float32 [1, channels, crop, crop].

    Resizing is Pillow's, as in training; size and offset are rounded as torchvision does.

    Raises:
        InputError: not a picture, or larger than ``MAX_PIXELS``.
    """
    import numpy as np

    picture = _cropped(_decoded(data, how.mode), how)
    values = np.asarray(picture, dtype=np.float32)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    mean, std = (np.asarray(v, np.float32).reshape(-1, 1, 1) for v in (how.mean, how.std))
    return np.ascontiguousarray(((values - mean) / std)[None])


def _decoded(data: bytes, mode: str) -> Image.Image:
    with extra("device"):
        from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise InputError(f"the picture measures {picture.width} x {picture.height}, more than 64 megapixels")
            return _upright(picture).convert(mode)
    # What Pillow's decoders raise on 300,000 damaged pictures.
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, Image.DecompressionBombError) as error:
        why = "" if isinstance(error, UnidentifiedImageError) else f": {error}"  # which names an object in memory
        raise InputError(f"these {len(data)} bytes are no picture{why}", "give a JPEG, PNG or WebP file") from error


def _upright(picture: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the whole EXIF anew, and fails on what cameras put there.
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(picture.getexif().get(ORIENTATION, 1))
    return picture if turn is None else picture.transpose(turn)


def _cropped(picture: Image.Image, how: ImagePreprocess) -> Image.Image:
    from PIL import Image

    filters = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "nearest": Image.Resampling.NEAREST,
    }
    width, height = picture.size
    short = min(width, height)
    size = (max(1, int(how.resize * width / short)), max(1, int(how.resize * height / short)))
    if size != picture.size:
        picture = picture.resize(size, filters[how.interpolation])
    left, top = round((size[0] - how.crop) / 2), round((size[1] - how.crop) / 2)
    return picture.crop((left, top, left + how.crop, top + how.crop))
