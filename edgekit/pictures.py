"""From an encoded picture to the tensor that a model was trained on: the same on the workstation and on the device."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Placement:
    """Where an upright picture of that size lies in a tensor: x there is x * ``scale[0]`` + ``offset[0]``, y alike."""

    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]


def picture_to_tensor(data: bytes, how: ImagePreprocess) -> Array:
    """Decode, resize, crop or pad, normalize: float32 [1, channels, crop, crop].

    Resizing is Pillow's, as in training; size and offset are rounded as torchvision does.

    Raises:
        InputError: not a picture, or larger than ``MAX_PIXELS``.
    """
    return placed(data, how)[0]


def placed(data: bytes, how: ImagePreprocess) -> tuple[Array, Placement]:
    """Return what `picture_to_tensor` does, and where in it the picture lies.

    Raises:
        InputError: not a picture, or larger than ``MAX_PIXELS``.
    """
    whole = _decoded(data, how.mode)
    size, (left, top) = _fit(whole.size, how)
    picture = _resized(whole, size, how)
    if how.fit == "pad":
        picture = _padded(picture, (left, top), how)
    else:
        picture = picture.crop((-left, -top, how.crop - left, how.crop - top))
    scale = (size[0] / whole.width, size[1] / whole.height)
    return _normalized(picture, how), Placement(whole.size, scale, (float(left), float(top)))


def _normalized(picture: Image.Image, how: ImagePreprocess) -> Array:
    import numpy as np

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


def _fit(size: tuple[int, int], how: ImagePreprocess) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size that a picture is resized to, and where its corner comes to lie in the tensor."""
    if how.fit == "stretch":
        return (how.crop, how.crop), (0, 0)
    if how.fit == "pad":
        width, height = (max(1, round(how.crop * length / max(size))) for length in size)
        return (width, height), ((how.crop - width) // 2, (how.crop - height) // 2)
    width, height = (max(1, int(how.resize * length / min(size))) for length in size)
    if width * height > MAX_PIXELS:
        raise InputError(f"the picture measures {size[0]} x {size[1]}: its shorter side cannot become {how.resize}")
    return (width, height), (-round((width - how.crop) / 2), -round((height - how.crop) / 2))


def _padded(picture: Image.Image, corner: tuple[int, int], how: ImagePreprocess) -> Image.Image:
    from PIL import Image

    whole = Image.new(how.mode, (how.crop, how.crop), (how.fill,) * len(how.mode))
    whole.paste(picture, corner)
    return whole


def _resized(picture: Image.Image, size: tuple[int, int], how: ImagePreprocess) -> Image.Image:
    from PIL import Image

    filters = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "nearest": Image.Resampling.NEAREST,
    }
    return picture if size == picture.size else picture.resize(size, filters[how.interpolation])
