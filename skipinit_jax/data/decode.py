"""From the bytes of an image file to a resized crop of it.

Decoding takes the time. libjpeg-turbo (simplejpeg) decodes, at a fraction of the size
where that leaves the crop large enough, and OpenCV resizes. OpenCV's own decoder is
about as fast, but does not tell that a file ends early. Pillow would cost a third of
the speed: to resize, it copies the image to four bytes a pixel.
"""

import io
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from skipinit_jax.errors import extra

# The crop's share of the image's area, and its width divided by its height.
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# 224 of 256 pixels.
_CENTER = 7 / 8


class Window(NamedTuple):
  """A part of an image, in pixels.

  Attributes:
    top: the first row.
    left: the first column.
    height: the number of rows.
    width: the number of columns.
  """

  top: int
  left: int
  height: int
  width: int


ChooseWindow: TypeAlias = Callable[[int, int], Window]
"""Returns the window of an image, given its height and width."""


def random_window(rng: np.random.Generator, height: int, width: int) -> Window:
  """Draws the window of a training example.

  Its area is uniform in 8 to 100 % of the image's, the logarithm of its aspect ratio is
  uniform between those of 3/4 and 4/3, and its position is uniform. Where ten draws do
  not fit into the image, it is the largest centered one of allowed aspect. This is how
  torchvision's `RandomResizedCrop` implements the sampling of Szegedy et al., "Going
  Deeper with Convolutions" (CVPR 2015), section 6.
  """
  for _ in range(_ATTEMPTS):
    area = rng.uniform(*_AREA) * height * width
    aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
    h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    if 0 < h <= height and 0 < w <= width:
      top = int(rng.integers(height - h, endpoint=True))
      left = int(rng.integers(width - w, endpoint=True))
      return Window(top, left, h, w)
  h = min(height, max(1, round(width / _ASPECT[0])))
  w = min(width, max(1, round(height * _ASPECT[1])))
  return Window((height - h) // 2, (width - w) // 2, h, w)


def center_window(height: int, width: int) -> Window:
  """Returns the window of an evaluation example: the central square.

  Its side is 7/8 of the image's shorter one. Resized to 224 pixels, it shows what the
  ImageNet examples of Flax (224 pixels and a padding of 32) and of torchvision
  (shorter side to 256, then the central 224) evaluate.
  """
  side = max(1, round(_CENTER * min(height, width)))
  return Window((height - side) // 2, (width - side) // 2, side, side)


def decode(encoded: bytes, choose_window: ChooseWindow, size: int) -> np.ndarray:
  """Decodes an image file, cuts out a window and resizes that.

  Args:
    encoded: the file: a JPEG, or anything else that Pillow reads.
    choose_window: chooses the window from the image's size.
    size: height and width of the result.

  Returns:
    The window in RGB, of a grayscale image too: uint8 [size, size, 3].

  Raises:
    ValueError: the file is damaged or no image.
  """
  with extra("photos"):
    import cv2
    import simplejpeg
  try:
    height, width, _, _ = simplejpeg.decode_jpeg_header(encoded)
    window = choose_window(height, width)
    # The decoder leaves out the fine detail of each 8 x 8 block (its cosine transform's
    # high frequencies), as far as the window keeps at least `size` pixels. What is
    # left shrinks by less than about 2, where bilinear interpolation skips no pixel.
    image = simplejpeg.decode_jpeg(
      encoded,
      "RGB",
      min_height=min(height, math.ceil(height * size / window.height)),
      min_width=min(width, math.ceil(width * size / window.width)),
      # Between 1 and 2 it would take longer than in full.
      min_factor=2,
    )
  except ValueError:
    # CMYK, another format, or a file with an error that Pillow may tolerate.
    image = _decode_with_pillow(encoded)
    height, width = image.shape[:2]
    window = choose_window(height, width)
  row_scale, column_scale = image.shape[0] / height, image.shape[1] / width
  top, bottom = _interval(window.top, window.height, row_scale)
  left, right = _interval(window.left, window.width, column_scale)
  return cv2.resize(
    image[top:bottom, left:right], (size, size), interpolation=cv2.INTER_LINEAR
  )


def _interval(start: int, length: int, scale: float) -> tuple[int, int]:
  begin = round(start * scale)
  return begin, max(begin + 1, round((start + length) * scale))


def _decode_with_pillow(encoded: bytes) -> np.ndarray:
  """Decodes an image in full: uint8 [height, width, 3]."""
  from PIL import Image, UnidentifiedImageError

  try:
    with Image.open(io.BytesIO(encoded)) as image:
      return np.asarray(image.convert("RGB"))
  except UnidentifiedImageError:
    # Pillow's own words name an object in memory.
    raise ValueError("its format is unknown") from None
  except (OSError, SyntaxError, Image.DecompressionBombError) as error:
    raise ValueError(str(error)) from error
